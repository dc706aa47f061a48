"""A fixed set of rows that are not trained on: the loss on them, and answers to their questions.

Rows of a batch have similar lengths and some batches are harder than others, so the loss of a step
jumps. The loss on the same rows each time does not. Nothing here is random or needs a gradient, so
it does not change the training.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from support.errors import UserError

SAMPLES = 3  # questions that are shown with their answers


class HeldOut:
    """Held-out rows of a data set, shared out over the processes.

    dataset: the rows; batches: this process's share of them, collated; samples: numbers of rows to
    show; join: whether encoders are sharded, so that all processes must run them together.
    """

    def __init__(self, dataset, batches: list, samples: list[int], join: bool):
        self.dataset = dataset
        self.batches = batches
        self.samples = samples[:SAMPLES]
        self.join = join

    @torch.no_grad()
    def loss(self, model) -> float:
        """Mean cross-entropy per answer token over all rows, in nats; 0 if no row has an answer."""
        totals = torch.zeros(2)  # sum of losses, number of labels
        for batch in self.batches:
            loss, _ = model(batch.to(model.device), join=self.join)
            totals += torch.tensor([loss.item(), batch.num_labels])
        model.reshard()  # else the next step would use the parameters gathered here
        dist.all_reduce(totals)
        return (totals[0] / totals[1].clamp(min=1)).item()

    @torch.no_grad()
    def answers(self, model) -> list[tuple[str, str, str]]:
        """(question, answer, truth) of some rows. All processes call it together.

        Rows that cannot be used or have no answer are left out.
        """
        model.eval()
        # MERV.answer does not pass through MERV.forward, where FSDP would gather these parameters.
        model.unshard()
        answers = []
        for number, row in enumerate(self.samples):
            try:
                _, video = self.dataset.parse(row)
                turns = self.dataset.rows[row]["conversations"]
                answered = len(turns) // 2
                if answered == 0:
                    continue
                turn = 2 * (number % answered)  # not always the first question
                question = turns[turn]["value"]
                if video is not None:
                    question = re.sub(r"<(image|video)>\s*", "", question)
                reply = model.answer(video, question, max_new_tokens=16)[0].text
            except UserError:  # of the row, or too long for the LLM together with its answer
                continue
            answers.append((question, reply, turns[turn + 1]["value"]))
        model.reshard()
        model.train()
        return answers

    def evaluate(self, model, number: int) -> float:
        """The loss after step `number`; rank 0 prints it with some answers."""
        loss = self.loss(model)
        answers = self.answers(model)
        if dist.get_rank() == 0:
            print(f"\nstep {number}, held-out loss {loss:.3f}")
            for question, reply, truth in answers:
                print(f"  {question:<36} answer: {reply:<24} truth: {truth}")
        return loss
