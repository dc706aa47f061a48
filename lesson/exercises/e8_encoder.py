"""Add a fifth encoder, in this file: a class and an entry of ENCODERS. Read encoders.Encoder, ViT.

Keep it simple: one Linear on the mean colour of each patch, no blocks (num_layers=0), and as many
time steps as the miniature has. After an edit of encoders.py itself, all data is made anew.

Which questions does it help? In a script, import this file, save the state of load_encoder(NAME)
as data/miniature/encoders-0/NAME.safetensors, and call train.main(["--encoders", "siglip,NAME"]).
"""

NAME = None  # the key of your entry in encoders.ENCODERS
