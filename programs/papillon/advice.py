"""Household troubles, and the points that good advice on each of them makes."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One thing that the advice must say."""

    text: str
    signs: str
    """A regular expression: whether a text makes the point."""

    def made_in(self, text: str) -> bool:
        """Whether the text makes this point, in these or like words."""
        return re.search(rf"\b(?:{self.signs})", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Topic:
    """One trouble."""

    name: str
    trouble: str
    """As the request tells it: a sentence."""
    thing: str
    """A regular expression for what is in trouble."""
    what: str
    """A regular expression for what the matter is."""
    points: tuple[Point, Point, Point]

    def known_in(self, text: str) -> bool:
        """Whether the text says both what is in trouble and what the matter is."""
        return all(re.search(rf"\b(?:{sign})", text, re.IGNORECASE) for sign in (self.thing, self.what))

    @property
    def advice(self) -> str:
        """All points, as sentences."""
        return " ".join(point.text for point in self.points)


def _topic(name: str, trouble: str, thing: str, what: str, *points: tuple[str, str]) -> Topic:
    first, second, third = (Point(text, signs) for text, signs in points)
    return Topic(name, trouble, thing, what, (first, second, third))


TOPICS = {
    topic.name: topic
    for topic in (
        _topic(
            "kettle",
            "The kettle is furred up with limescale.",
            "kettle",
            "lime|scale|fur",
            ("Fill it with one part vinegar and two parts water.", "vinegar|citric|lemon"),
            ("Bring it to the boil and let it stand for half an hour.", "boil"),
            ("Rinse it twice before it is used again.", "rins"),
        ),
        _topic(
            "door",
            "The kitchen door squeaks.",
            "door|hinge",
            "squeak|creak|noise",
            ("Put a drop of oil on each hinge.", "oil|grease|lubric"),
            ("Swing it to and fro until the sound is gone.", "swing|to and fro|back and forth|open and close"),
            ("Wipe off what drips.", "wip"),
        ),
        _topic(
            "carpet",
            "There is a stain of red wine on the carpet.",
            "carpet|rug",
            "wine|stain",
            ("Blot it at once and do not rub.", "blot|dab"),
            ("Cover it with salt and let that draw the liquid out.", "salt|baking soda|bicarbonate"),
            ("Sponge the rest off with cold water.", "cold water|cool water"),
        ),
        _topic(
            "bicycle",
            "The chain of the bicycle is rusty.",
            "bicycle|bike|chain",
            "rust",
            ("Brush the loose flakes off with a stiff brush.", "brush"),
            ("Clean it with a degreaser and dry it.", "degreas|solvent|clean"),
            ("Oil every link and wipe off the excess.", "oil|lubric"),
        ),
        _topic(
            "plant",
            "The fig in the hall has yellow leaves.",
            "fig|plant",
            "yellow",
            ("Let the soil dry out before it is watered again.", "dry out|water less|overwater|dry between"),
            ("Make sure that the pot drains.", "drain"),
            ("Move it to where there is more light.", "light|sun|window"),
        ),
        _topic(
            "sink",
            "The sink is blocked and runs off slowly.",
            "sink|drain",
            "block|clog|slow",
            ("Pour in half a cup of baking soda.", "baking soda|bicarbonate"),
            ("Add a cup of vinegar and wait until the foam settles.", "vinegar"),
            ("Flush it with hot water.", "hot|boiling"),
        ),
        _topic(
            "window",
            "The bedroom windows are wet every morning.",
            "window|pane",
            "wet|damp|condens|moist",
            ("Air the room for ten minutes twice a day.", "air|ventilat"),
            ("Keep the heating on low and even.", "heat"),
            ("Wipe the panes and sills dry.", "wip"),
        ),
        _topic(
            "tablecloth",
            "Candle wax has dripped on the tablecloth.",
            "tablecloth|cloth|linen",
            "wax",
            ("Harden it with ice.", "ice|freez|cold"),
            ("Scrape off what comes away.", "scrap"),
            ("Iron the rest out between sheets of paper.", "iron"),
        ),
        _topic(
            "table",
            "A hot cup has left a white ring on the oak table.",
            "table",
            "ring|mark",
            ("Warm the spot with a hair dryer.", "warm|hair ?dryer|iron"),
            ("Rub in a little oil or furniture polish.", "oil|polish|mayonnaise"),
            ("Buff it with a soft cloth.", "buff|soft cloth|rub"),
        ),
        _topic(
            "pan",
            "The milk has burnt onto the bottom of the pan.",
            "pan|pot",
            "burn|char|scorch",
            ("Soak it overnight.", "soak"),
            ("Simmer water with baking soda in it.", "baking soda|bicarbonate"),
            ("Scrub off the rest with a sponge.", "scrub|scour|scrap"),
        ),
        _topic(
            "cupboard",
            "The cupboard in the attic smells musty.",
            "cupboard|wardrobe|closet",
            "must|smell|odou?r",
            ("Empty it and let it air for a day.", "air|ventilat|open"),
            ("Wash the boards with vinegar and water.", "vinegar"),
            ("Leave a bowl of charcoal in it.", "charcoal|baking soda|bicarbonate|coffee"),
        ),
        _topic(
            "zip",
            "The zip of the tent is stuck.",
            "zip",
            "stuck|jam",
            ("Pull out any cloth that is caught in it.", "cloth|fabric|thread"),
            ("Draw a pencil or a bar of soap along the teeth.", "pencil|graphite|soap|candle"),
            ("Move the slider gently, a little at a time.", "gentl|little at a time|slowly"),
        ),
        _topic(
            "lawn",
            "The lawn is overgrown with moss.",
            "lawn|grass",
            "moss",
            ("Rake it out.", "rake|raking|scarif"),
            ("Test the soil and spread lime if it is sour.", "lime|ph\\b"),
            ("Sow new seed in the gaps.", "seed|sow"),
        ),
        _topic(
            "shoes",
            "The leather shoes are soaked through.",
            "shoe|boot|leather",
            "soak|wet",
            ("Stuff them with newspaper and change it when it is damp.", "paper|newspaper"),
            ("Keep them away from the stove.", "away from|room temperature|no direct heat"),
            ("Rub them with cream once they are dry.", "cream|polish|wax|conditioner"),
        ),
    )
}
