"""Stand-ins: what replaces the recognised parts of a model while it is prepared. One file per part."""
