"""Labels from turns. Read data.tokenize, and figure 7."""


def ids_and_labels(turns, tokenizer):
    """Turns [(text, is_answer), ...] -> ids and labels, two lists of one length.

    bos_id comes first, eos_id after each answer; labels are -100 wherever there is no loss.
    """
    raise NotImplementedError("tokenizer.encode(text) gives the ids of one turn")
