"""Add a fifth encoder: one class and one entry of ENCODERS. Read encoders.Encoder and ViT.

Keep it simple: one Linear on the mean colour of each patch, without blocks (num_layers=0). Its grid
must have as many time steps as those of the miniature's other encoders.

Which questions does it help? In a script, import this file, save the state of load_encoder(NAME)
as data/miniature/encoders-0/NAME.safetensors, and call train.main(["--encoders", "siglip,NAME"]).
"""

NAME = None  # the key of your entry in encoders.ENCODERS
