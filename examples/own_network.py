"""Your own network, with all that main.py does around a training:

python main.py --data-root data/glyphs --learner examples/own_network.py:Net --bi-init 0 0

Net is called with those arguments of learner.Conv4 that it has, such as n_classes and image_size.
--bi-init 0 0 starts with steps of half the gradient, which is divided by the batch size: a small
network learns within hundreds of episodes. The default, -5 -4, gives about 1/100 of it, for tens of
thousands.
"""

from torch import nn


class Net(nn.Sequential):
    def __init__(self, n_classes):
        layers = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2), nn.BatchNorm2d(after), nn.ReLU()]
        pool = nn.AdaptiveAvgPool2d(2)
        super().__init__(*layers, pool, nn.Flatten(), nn.Linear(4 * 64, n_classes))
