"""The machine behind the RAM: its QMP monitor, live checkpoint, and the vmstate stream it starts from."""
