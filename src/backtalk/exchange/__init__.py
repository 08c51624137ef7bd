"""Read trajectories of other libraries, and write ours for them."""
