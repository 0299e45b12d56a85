"""Everything the paper does not discuss. Each file can be read on its own."""
