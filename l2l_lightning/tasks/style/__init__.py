"""What style transfer is made of: pictures, textures, and networks whose features are compared."""
