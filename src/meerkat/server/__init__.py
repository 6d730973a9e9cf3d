"""What the server does: it holds no data and no model, only n floats, seeds and scalars."""
