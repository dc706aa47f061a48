"""Add a fifth encoder: one class and one entry of ENCODERS. Read encoders.Encoder and ViT.

Keep it simple: one Linear on the mean colour of each patch, without blocks (num_layers=0). Its grid
must have as many time steps as those of the miniature's other encoders.

Which questions does it help? Write a script that imports this file, saves load_encoder(NAME)'s state
as data/miniature/encoders-0/NAME.safetensors, and calls train.main(["--encoders", "siglip,NAME"]).
"""

NAME = None  # the key of your entry in encoders.ENCODERS
