"""Nothing of the paper: what the scripts need besides, each file to be read alone."""
