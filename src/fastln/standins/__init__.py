"""What recognised parts of a model become while it is prepared: one file per part."""
