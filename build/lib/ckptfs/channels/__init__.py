"""Trio and the operating system: aligned buffers, backing files, multifd channels, publication by rename."""
