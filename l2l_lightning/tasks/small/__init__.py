"""Small problems of many kinds, drawn at random: what they are made of."""
