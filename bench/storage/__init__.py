"""The trainer's object store client beside s5cmd, on one S3 server of this machine."""
