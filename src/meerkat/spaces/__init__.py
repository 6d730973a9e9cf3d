"""Where the training state may move: masks, how they are found, and the parameters behind them."""
