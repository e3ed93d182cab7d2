"""The dialect of Hugging Face PEFT."""
