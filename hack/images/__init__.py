"""The container images: how they are proven where no container engine runs, what is in them, and under which licences.

`PYTHONPATH=hack python -m images --help`; docs/images.md says more.
"""
