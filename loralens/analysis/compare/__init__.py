"""Several adapters beside each other: subspaces, cosines, interference, equality."""
