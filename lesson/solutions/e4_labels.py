"""Labels from turns."""

NO_LOSS = -100  # the label that PyTorch's cross-entropy skips


def ids_and_labels(turns, tokenizer):
    """Turns [(text, is_answer), ...] -> ids and labels, two lists of one length."""
    ids = [tokenizer.bos_id]
    labels = [NO_LOSS]
    for text, is_answer in turns:
        turn = tokenizer.encode(text)
        if is_answer:
            turn = [*turn, tokenizer.eos_id]
            labels += turn
        else:
            labels += [NO_LOSS] * len(turn)
        ids += turn
    return ids, labels
