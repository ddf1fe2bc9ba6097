"""Other people's files, known by their heads. Pure: bytes in, values out."""
