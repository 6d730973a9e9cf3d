"""What an export has besides weights: card, recipe, Modelfile, adapters for peft, a hub."""
