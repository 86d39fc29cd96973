"""The hooks in transformers, and how `generate` runs behind them."""
