"""The operator beside a floor of plain asyncio, on a real API server: `python -m bench.operator`."""
