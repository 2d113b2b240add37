"""What a weight becomes: grids, codes and bytes."""
