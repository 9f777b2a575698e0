"""Domain-adversarial training (Ganin et al., JMLR 17(59), 2016) on the magnification."""

import timm
import torch.nn.functional as F

from magnification_invariant.models import dann_coeff
from magnification_invariant.tasks.task import Player, Task, parameters_except


class DANN(Task):
    """Class cross-entropy plus the domain head's cross-entropy behind a gradient reversal.

    The domain head minimises its own loss; the backbone receives that loss's gradient times ``-coeff``. With a
    coefficient of 0 backbone and classifier train exactly, bit for bit, as under `ERM`.

    Args:
        coeff: the largest coefficient; it rises towards it as ``coeff * dann_coeff(progress)``.
    """

    arch = "magdg_resnet18"

    def __init__(self, model, *, coeff: float = 1.0, **kwargs):
        super().__init__(model, **kwargs)
        if not getattr(model, "num_domains", 0):
            raise ValueError(
                "DANN needs a model with a domain head, such as magdg_resnet18 or test_magdg_resnet with num_domains "
                f"> 0; {type(model).__name__} has none"
            )
        self.coeff = coeff
        model.set_domain_training(True)

    @classmethod
    def create_model(cls, arch, *, num_classes, num_domains, **kwargs):
        return timm.create_model(arch, num_classes=num_classes, num_domains=num_domains, **kwargs)

    @property
    def players(self):
        head = self.model.domain_head
        return [Player("model", [parameters_except(self.model, head), list(head.parameters())])]

    def forward(self, input, target, domain, progress, player=0):
        coeff = self.coeff * dann_coeff(progress)
        self.model.set_grl_coeff(coeff)
        output, domain_output = self.model(input)
        class_loss, domain_loss = self.class_loss(output, target), F.cross_entropy(domain_output, domain)
        return {
            "loss": class_loss + domain_loss,
            "output": output,
            "class_loss": class_loss.detach(),
            "domain_loss": domain_loss.detach(),
            "domain_accuracy": (domain_output.argmax(1) == domain).float().mean(),
            "coeff": coeff,
        }
