"""What is known of Hugging Face models."""
