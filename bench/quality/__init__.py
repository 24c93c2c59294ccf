"""What a quantized base costs in quality: `python -m bench.quality --model FOLDER`."""
