"""What every training method shares: ranks, models, precision, adapters, callbacks."""
