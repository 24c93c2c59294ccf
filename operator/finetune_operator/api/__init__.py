"""The API: types, rules and the CRD made of them. Pure: no I/O."""
