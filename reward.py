"""Judges: they look at a picture before and after an edit and say how good the edit was.

    judge = load("exact")             # the embedded world's: reads the pictures symbolically, cannot be fooled by style
    judge = load("path/or/hub-id")    # a vision-language model in process
    r = judge(tasks, images, k)       # (S, M) in [0, 1]; NaN where the judge failed, never 0
    judge.names, judge.weights        # what the M columns are, and how they are weighted unless the user says otherwise

`tasks` has S entries, `images` (S, k+2, 3, H, W) uint8 the pictures so far: [:, 0] the source, [:, k] before turn k,
[:, k+1] after it. Judges run in a background thread while the next turn is sampled.
"""
import sys

import numpy as np
import torch
from PIL import Image

RUBRICS = {
    "following": "The second picture was made from the first by this instruction: \"{instruction}\" Was exactly what it "
                 "asks for done, completely and cleanly? Answer with one digit from 0 (not at all) to 9 (perfectly).",
    "consistency": "The second picture was made from the first by this instruction: \"{instruction}\" Is everything that "
                   "it does not speak of unchanged? Answer with one digit from 0 (all changed) to 9 (nothing changed).",
}


def load(spec, device="cpu"):
    """A judge by name: "exact", or the folder or hub id of a vision-language model. ValueError if it is neither."""
    return ExactJudge() if spec == "exact" else VLMJudge(spec, device)


class ExactJudge:
    """The embedded world's own judge (shapes/world.py): needs tasks with meta["scenes"]."""
    names = ["following", "consistency", "success"]   # graded IF, CC, and IF as 0 or 1
    weights = [.8, .2, 0.]                            # graded scores only: groups of equal 0s and 1s teach nothing

    def check(self, tasks):
        """ValueError if these tasks cannot be judged."""
        if any("scenes" not in task.meta for task in tasks):
            raise ValueError("the exact judge knows the embedded world only; judge pictures of your own by a VLM (--judge)")

    def __call__(self, tasks, images, k):
        from shapes import world
        self.check(tasks)
        after, before = images[:, k + 1].permute(0, 2, 3, 1).numpy(), images[:, k].permute(0, 2, 3, 1).numpy()
        success, following, consistency = world.judge(after, before, [task.meta["scenes"][:k + 2] for task in tasks])
        return torch.from_numpy(np.stack([following, consistency, success], 1))


class VLMJudge:
    """A vision-language model in process: one forward, the expectation over the ten digit tokens.

    The digits' ids are looked up through the tokenizer; a softmax over them alone gives p, the score is sum_d p_d d / 9.
    """
    names = ["following", "consistency"]
    weights = [.5, .5]

    def __init__(self, path, device="cpu", micro=8):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        try:
            self.processor = AutoProcessor.from_pretrained(path)
            self.model = AutoModelForImageTextToText.from_pretrained(path).to(device).eval().requires_grad_(False)
        except Exception as error:      # transformers raises many kinds for what is no such model, and for what is not installed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"--judge {path} is neither 'exact' nor a vision-language model that loads here: {reason}") from None
        if self.processor.chat_template is None:
            raise ValueError(f"--judge {path} is no judge: its processor has no chat template")
        self.device, self.micro = device, micro
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"               # so that the last position is the answer's in every row
        ids = [tokenizer.encode(str(d), add_special_tokens=False)[-1] for d in range(10)]
        if len(set(ids)) < 10:
            raise ValueError(f"--judge {path} is no judge: its tokenizer has no token of its own for each digit")
        self.digits = torch.tensor(ids, device=device)

    def check(self, tasks):
        """Any task can be judged."""

    def __call__(self, tasks, images, k):
        # following: against the picture just before; consistency: against the original, so that slow drift is seen
        pairs = {"following": images[:, [k, k + 1]], "consistency": images[:, [0, k + 1]]}
        told = {"following": [task.instructions[k] for task in tasks],
                "consistency": [". ".join(task.instructions[:k + 1]) for task in tasks]}
        columns = [self.score(pairs[name], [RUBRICS[name].format(instruction=i) for i in told[name]]) for name in self.names]
        return torch.stack(columns, 1)

    def score(self, pairs, questions):
        """Pairs of pictures (S, 2, 3, H, W) uint8 and S questions -> scores (S,) in [0, 1]; NaN where the model fails."""
        scores = torch.full((len(pairs),), float("nan"))

        def fill(rows):
            try:
                scores[rows] = self.expectation([[Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pairs[s]] for s in rows],
                                                [questions[s] for s in rows]).cpu()
            except Exception as error:
                if len(rows) == 1:
                    print(f"the judge failed: {type(error).__name__}: {error}", file=sys.stderr)
                for row in rows.split(1) if len(rows) > 1 else []:        # one bad row must not take the others with it
                    fill(row)
        for rows in torch.arange(len(pairs)).split(self.micro):
            fill(rows)
        return scores

    @torch.no_grad()
    def expectation(self, pictures, questions):
        chats = [[{"role": "user", "content": [{"type": "image"}] * len(p) + [{"type": "text", "text": q}]}]
                 for p, q in zip(pictures, questions)]
        text = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        bos = self.processor.tokenizer.bos_token       # many templates write it already: twice would be another prompt
        inputs = self.processor(images=pictures, text=text, padding=True, return_tensors="pt",
                                add_special_tokens=not (bos and text[0].startswith(bos))).to(self.device)
        logits = self.model(**inputs).logits[:, -1, self.digits].float()                    # (S, 10)
        return logits.softmax(-1) @ torch.arange(10., device=self.device) / 9
