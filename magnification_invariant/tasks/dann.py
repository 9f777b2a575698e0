"""Domain-adversarial training (Ganin et al., JMLR 17(59), 2016) on the magnification."""

import timm
import torch
import torch.nn.functional as F

from magnification_invariant.models import dann_coeff, grad_reverse
from magnification_invariant.tasks.task import Player, Task, parameters_except

SCHEDULES = ("dann", "constant", "linear", "adaptive")


class DANN(Task):
    """Class cross-entropy plus the domain head's cross-entropy behind a gradient reversal.

    The domain head minimises its own loss; the backbone receives that loss's gradient times ``-coeff``. With a
    coefficient of 0 backbone and classifier train exactly, bit for bit, as under `ERM`.

    Args:
        coeff: the largest coefficient c.
        coeff_schedule: how it depends on the share p of the training done. "dann": ``c dann_coeff(p)``; "constant":
            ``c``; "linear": ``c p``; "adaptive": ``c dann_coeff(p) |dL_class/dz| / |dL_domain/dz|`` at the pooled
            features z of the batch, so that the adversary pushes the features as hard as the class loss does, however
            large or small its own gradient has become. Of several processes, each takes it from its own share.
        critic_steps: 0 trains the domain head in the same step as the rest. Otherwise it is a player of its own that
            takes so many steps, on frozen features, before each step of the rest.
    """

    arch = "magdg_resnet18"
    options = ("label_smoothing", "coeff", "coeff_schedule", "critic_steps")

    def __init__(self, model, *, coeff: float = 1.0, coeff_schedule: str = "dann", critic_steps: int = 0, **kwargs):
        super().__init__(model, **kwargs)
        if not getattr(model, "num_domains", 0):
            raise ValueError(
                "DANN needs a model with a domain head, such as magdg_resnet18 or test_magdg_resnet with num_domains "
                f"> 0; {type(model).__name__} has none"
            )
        if model.num_domains < 2:
            raise ValueError("DANN needs at least two training domains to tell apart, and there is one: use erm")
        if coeff_schedule not in SCHEDULES:
            raise ValueError(f"unknown coefficient schedule {coeff_schedule!r}: choose from {', '.join(SCHEDULES)}")
        if not isinstance(critic_steps, int) or critic_steps < 0:
            raise ValueError(f"critic_steps is a number of steps, 0 for a common one, not {critic_steps!r}")
        self.coeff, self.coeff_schedule, self.critic_steps = coeff, coeff_schedule, critic_steps

    @classmethod
    def create_model(cls, arch, *, num_classes, num_domains, **kwargs):
        return timm.create_model(arch, num_classes=num_classes, num_domains=num_domains, **kwargs)

    @property
    def critic(self) -> list[torch.nn.Parameter]:
        """What minimises the domain loss and nothing else."""
        return list(self.model.domain_head.parameters())

    @property
    def players(self):
        rest = parameters_except(self.model, self.model.domain_head)
        if self.critic_steps:
            return [Player("critic", [self.critic], steps=self.critic_steps), Player("model", [rest])]
        return [Player("model", [rest, self.critic])]

    def domain_loss(self, pooled, target, domain) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the domain head on pooled features (b, width), and its logits (b, domains)."""
        output = self.model.domain_head(pooled)
        return F.cross_entropy(output, domain), output

    def forward(self, input, target, domain, progress, player=0):
        critic_alone = self.critic_steps and player == 0
        with torch.set_grad_enabled(not critic_alone and torch.is_grad_enabled()):
            pooled = self.model.forward_head(self.model.forward_features(input), pre_logits=True)
        if critic_alone:
            loss, output = self.domain_loss(pooled, target, domain)
            return {"loss": loss, "output": output, "critic_loss": loss.detach()}
        coeff = self._coefficient(pooled, target, domain, progress)
        output = self.model.get_classifier()(pooled)
        domain_loss, domain_output = self.domain_loss(grad_reverse(pooled, coeff), target, domain)
        class_loss = self.class_loss(output, target)
        return {
            "loss": class_loss + domain_loss,
            "output": output,
            "class_loss": class_loss.detach(),
            "domain_loss": domain_loss.detach(),
            "domain_accuracy": (domain_output.argmax(1) == domain).float().mean(),
            "coeff": coeff,
        }

    def _coefficient(self, pooled, target, domain, progress) -> torch.Tensor:
        if self.coeff_schedule == "constant":
            return self.coeff * torch.ones_like(progress)
        if self.coeff_schedule == "linear":
            return self.coeff * progress
        coeff = self.coeff * dann_coeff(progress)
        if self.coeff_schedule == "adaptive":
            z = pooled.detach().requires_grad_()
            class_loss = self.class_loss(self.model.get_classifier()(z), target)
            domain_loss, _ = self.domain_loss(z, target, domain)
            (by_class,), (by_domain,) = torch.autograd.grad(class_loss, z), torch.autograd.grad(domain_loss, z)
            coeff = coeff * by_class.norm() / by_domain.norm().clamp(min=1e-12)
        return coeff
