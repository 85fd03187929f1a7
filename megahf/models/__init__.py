"""What travels: the files save_pretrained copies next to config.json; they run without megahf installed."""
