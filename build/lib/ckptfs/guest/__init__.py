"""One guest's RAM: a base checkpoint (perhaps none) overlaid with the pages written since."""
