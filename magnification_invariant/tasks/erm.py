"""Empirical risk minimisation (Vapnik 1998): the supervised baseline."""

from magnification_invariant.tasks.task import Task, register


@register("erm")
class ERM(Task):
    """Cross-entropy of the class, nothing else. `domain` and `progress` are not used."""

    arch = "magerm_resnet18"

    def forward(self, input, target, domain, progress, player=0):
        output = self.model(input)
        loss = self.class_loss(output, target)
        return {"loss": loss, "output": output, "class_loss": loss.detach()}
