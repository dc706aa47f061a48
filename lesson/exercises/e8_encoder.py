"""Add a fifth encoder: one class and one entry of ENCODERS. Read encoders.Encoder and ViT.

Let it be simple: one Linear of the mean colour of each patch, without blocks (num_layers=0). Its
grid must have the 4 time steps of the miniature's other encoders.
"""

NAME = None  # the key of your entry in encoders.ENCODERS
