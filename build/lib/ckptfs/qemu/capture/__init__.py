"""Taking a machine at one moment: its device state and its RAM, whatever else happens to it meanwhile.

``session`` is what every way of capturing shares: QEMU's settings, the pipe that its stream comes through, the
pause, and the others who command the same machine. The ways themselves: ``mounted`` for RAM in files of a mount,
``arriving`` for a machine whose RAM is its own.
"""
