"""Tritonmark exporters: Hugging Face models to Triton model repositories, and the embedded server."""
