"""The API: types, rules, the CRD made of them, manifests read into them. Pure, but for `parse.load_manifests`."""
