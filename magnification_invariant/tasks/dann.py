"""Domain-adversarial training (Ganin et al., JMLR 17(59), 2016) on the magnification."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from magnification_invariant.models import add_domain_head, dann_coeff, forward_heads, pooled_features
from magnification_invariant.tasks.options import option
from magnification_invariant.tasks.task import Player, Task, register


@register("dann")
class DANN(Task):
    """Class cross-entropy plus the domain head's cross-entropy behind a gradient reversal.

    The domain head minimises its own loss; the backbone receives that loss's gradient times ``-c``. With a coefficient
    of 0 backbone and classifier train exactly, bit for bit, as under `ERM`. The size of c depends on the share p of the
    training done, by the option ``coeff_schedule``:

    - "dann": ``coeff * dann_coeff(p)``; "constant": ``coeff``; "linear": ``coeff * p``;
    - "adaptive": ``coeff * dann_coeff(p) |dL_class/dz| / |dL_domain/dz|`` at the pooled features z of the batch, so
      that the adversary pushes the features as hard as the class loss does, however large or small its own gradient
      has become. Of several processes, each takes it from its own share.

    With ``critic_steps`` the domain head is a player of its own, which trains on frozen features.

    Raises:
        ValueError: If the model has no domain head, see `models.add_domain_head`.
    """

    @dataclass(frozen=True)
    class Options(Task.Options):
        coeff: float = option(1.0, "largest coefficient of the reversed gradient", search=(0.1, 3.0, "log"))
        coeff_schedule: str = option(
            "dann",
            "how the coefficient grows over the training",
            search=("dann", "adaptive"),
            choices=("dann", "constant", "linear", "adaptive"),
        )
        critic_steps: int = option(
            0, "steps of the domain head alone before each step of the rest; 0: common steps", bounds=(0, 1000)
        )

    arch = "magdg_resnet18"

    def __init__(self, model, options=None):
        super().__init__(model, options)
        if not hasattr(model, "domain_head"):
            raise ValueError(f"this {type(model).__name__} has no domain head: give it one by models.add_domain_head")

    @classmethod
    def create_model(cls, arch, *, num_classes, num_domains, **kwargs):
        model = super().create_model(arch, num_classes=num_classes, num_domains=num_domains, **kwargs)
        return add_domain_head(model, num_domains)

    @property
    def critic(self) -> list[torch.nn.Parameter]:
        """What minimises the domain loss and nothing else."""
        return list(self.model.domain_head.parameters())

    @property
    def players(self):
        head = {id(parameter) for parameter in self.model.domain_head.parameters()}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in head]
        if self.options.critic_steps:
            return [Player("critic", [self.critic], steps=self.options.critic_steps), Player("model", [rest])]
        return [Player("model", [rest, self.critic])]

    def shift(self, target: Tensor) -> Tensor | None:
        """What the domain head reads beside the pooled features, (b, width) to be added; nothing here."""
        return None

    def domain_loss(self, domain_output: Tensor, target: Tensor, domain: Tensor) -> Tensor:
        """Loss of domain logits (b, domains), 0-d."""
        return F.cross_entropy(domain_output, domain)

    def forward(self, input, target, domain, progress, player=0):
        critic_alone = self.options.critic_steps and player == 0
        with torch.set_grad_enabled(not critic_alone and torch.is_grad_enabled()):
            pooled = pooled_features(self.model, input)
        coeff = progress if critic_alone else self.coefficient(pooled, target, domain, progress)
        output, domain_output = forward_heads(self.model, pooled, coeff, self.shift(target))
        domain_loss = self.domain_loss(domain_output, target, domain)
        if critic_alone:
            return {"loss": domain_loss, "output": output, "critic_loss": domain_loss.detach()}
        class_loss = self.class_loss(output, target)
        return {
            "loss": class_loss + domain_loss,
            "output": output,
            "class_loss": class_loss.detach(),
            "domain_loss": domain_loss.detach(),
            "domain_accuracy": (domain_output.argmax(1) == domain).float().mean(),
            "coeff": coeff,
        }

    def coefficient(self, pooled: Tensor, target: Tensor, domain: Tensor, progress: Tensor) -> Tensor:
        """Coefficient of the reversal of this batch, 0-d, see the class."""
        schedule = self.options.coeff_schedule
        if schedule == "constant":
            return self.options.coeff * torch.ones_like(progress)
        if schedule == "linear":
            return self.options.coeff * progress
        coeff = self.options.coeff * dann_coeff(progress)
        if schedule == "adaptive":
            z = pooled.detach().requires_grad_()
            output, domain_output = forward_heads(self.model, z, torch.ones_like(progress), self.shift(target))
            losses = self.class_loss(output, target), self.domain_loss(domain_output, target, domain)
            by_class, by_domain = (torch.autograd.grad(loss, z)[0].norm() for loss in losses)
            coeff = coeff * by_class / by_domain.clamp(min=1e-12)
        return coeff
