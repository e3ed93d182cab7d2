"""Hugging Face PEFT."""
