"""A frozen base in FP8 (`quantization.type: fp8`): its arithmetic, its layer, and how it is loaded.

The other types are bitsandbytes' (`methods.qlora`).
"""
