"""Class-conditional domain-adversarial training, in DomainBed's form.

Li et al., "Deep Domain Generalization via Conditional Invariant Adversarial Networks", ECCV 2018; Gulrajani and
Lopez-Paz, ICLR 2021.
"""

import torch
import torch.nn.functional as F

from magnification_invariant.models import linear_classifier
from magnification_invariant.tasks.dann import DANN
from magnification_invariant.tasks.task import register


@register("cdann")
class CDANN(DANN):
    """`DANN` whose adversary knows the class, so that features need to be alike within a class only.

    The domain head D reads ``z + e_y``, z the pooled features and e_y a learned embedding of the class, and every class
    of the batch weighs the same::

        L_domain = sum_i CE(D(z_i + e_{y_i}), d_i) / (K n_{y_i})

    with K classes and n_y images of class y in the batch (DomainBed's `CDANN`, which for Li et al.'s K discriminators
    has one that is told the class). The embedding minimises L_domain with D; the backbone receives its gradient
    reversed, as under `DANN`.
    """

    def __init__(self, model, options=None):
        super().__init__(model, options)
        classifier = linear_classifier(model)
        self.class_embedding = torch.nn.Embedding(classifier.out_features, classifier.in_features)

    @property
    def critic(self):
        return [*super().critic, *self.class_embedding.parameters()]

    def shift(self, target):
        return self.class_embedding(target)

    def domain_loss(self, domain_output, target, domain):
        count = F.one_hot(target, self.class_embedding.num_embeddings).sum(0)
        weight = 1 / (count[target] * len(count))
        return (weight * F.cross_entropy(domain_output, domain, reduction="none")).sum()
