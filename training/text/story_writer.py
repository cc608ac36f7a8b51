# SPDX-License-Identifier: Apache-2.0
"""A seeded writer of short children's stories: the training text that needs no download.

Every story draws a character, a friend, a grown-up, a place, a required noun with an adjective that suits it and a
verb that it allows, one of eight plots, and features (dialogue, foreshadowing, moral, plot twist, bad ending; the
quarrel plot is the conflict). The plot says which sentences follow each other; `{fields}` in them are the drawn words.
The same words return through the whole story, so predicting it well needs a memory of what was said before.

Only the standard library is used, and of it only `Random.random`, whose sequence Python keeps from version to version.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple


class Thing(NamedTuple):
    """What the story is about: `kind` decides which plots take it, `ruin` how a bad ending finds it."""

    noun: str
    kind: str
    adjectives: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]  # (base, past)
    ruin: str = "broken"
    extra: str = ""  # the plot's own word: how practice goes wrong, or what is missing


class Plot(NamedTuple):
    """Alternatives for each step of a story. `twist` and `bad` close the story; after `happy` comes an `end`."""

    kinds: tuple[str, ...]
    setup: tuple[str, ...]
    foreshadow: tuple[str, ...]
    trouble: tuple[str, ...]
    talk: tuple[str, ...]
    told: tuple[str, ...]
    happy: tuple[str, ...]
    twist: tuple[str, ...]
    bad: tuple[str, ...]
    end: tuple[str, ...]
    moral: tuple[str, ...]


def _thing(noun: str, kind: str, adjectives: str, verbs: str, ruin: str = "broken", extra: str = "") -> Thing:
    pairs = tuple(tuple(verb.split(":")) for verb in verbs.split())
    return Thing(noun, kind, tuple(adjectives.split()), pairs, ruin, extra)


# "light" things can be blown away, "big" ones are not carried about, "skill" and "craft" belong to one plot each.
THINGS = (
    _thing("ball", "toy", "red blue green big small round shiny", "kick:kicked throw:threw catch:caught", "flat"),
    _thing("toy boat", "toy", "red blue white little wooden old", "push:pushed pull:pulled sail:sailed"),
    _thing("toy truck", "toy", "yellow red big shiny loud new", "push:pushed pull:pulled fill:filled"),
    _thing("doll", "toy", "pretty small soft old new tiny", "hug:hugged carry:carried dress:dressed", "torn"),
    _thing("teddy bear", "toy", "brown soft big old fluffy", "hug:hugged squeeze:squeezed carry:carried", "torn"),
    _thing("drum", "toy", "big loud red round new", "play:played tap:tapped hit:hit"),
    _thing("bell", "toy", "shiny gold little silver loud", "ring:rang shake:shook"),
    _thing("horn", "toy", "loud shiny long old", "blow:blew hold:held"),
    _thing("blocks", "toy", "red blue wooden big yellow", "stack:stacked count:counted"),
    _thing("marble", "toy", "green blue shiny tiny pretty", "roll:rolled spin:spun", "cracked"),
    _thing("puppet", "toy", "funny small old silly", "move:moved hold:held", "torn"),
    _thing("book", "tool", "new old big thin funny blue", "read:read open:opened hold:held", "torn"),
    _thing("map", "tool", "old big secret yellow", "read:read open:opened hold:held", "torn"),
    _thing("box", "tool", "pretty little wooden blue secret", "open:opened fill:filled paint:painted"),
    _thing("basket", "tool", "big brown light small round", "carry:carried fill:filled"),
    _thing("cup", "tool", "blue pink little pretty orange", "fill:filled hold:held"),
    _thing("blanket", "tool", "soft warm fluffy purple old", "hug:hugged hold:held", "torn"),
    _thing("pillow", "tool", "soft big fluffy white", "hug:hugged squeeze:squeezed", "torn"),
    _thing("crayons", "tool", "bright new thick pretty", "use:used count:counted"),
    _thing("shell", "find", "pink white pretty smooth tiny", "hold:held touch:touched"),
    _thing("stone", "find", "smooth gray round shiny blue", "hold:held touch:touched", "cracked"),
    _thing("coin", "find", "gold shiny silver old", "spin:spun flip:flipped rub:rubbed", "bent"),
    _thing("key", "find", "old gold tiny silver", "turn:turned hold:held", "bent"),
    _thing("flower", "find", "yellow pink pretty tiny orange", "smell:smelled water:watered touch:touched", "dead"),
    _thing("beads", "find", "purple shiny tiny orange", "count:counted touch:touched roll:rolled"),
    _thing("coat", "wear", "warm red soft new purple", "wear:wore", "torn"),
    _thing("crown", "wear", "gold shiny tall pretty", "wear:wore hold:held"),
    _thing("mask", "wear", "funny green silly scary", "wear:wore paint:painted", "torn"),
    _thing("boots", "wear", "yellow big shiny new", "wear:wore", "torn"),
    _thing("mittens", "wear", "warm blue soft pink", "wear:wore", "torn"),
    _thing("necklace", "wear", "pretty silver long blue", "wear:wore touch:touched"),
    _thing("hat", "light", "red tall funny green big orange", "wear:wore hold:held", "torn"),
    _thing("scarf", "light", "long warm striped blue purple", "wear:wore wave:waved", "torn"),
    _thing("cape", "light", "red blue long purple", "wear:wore wave:waved", "torn"),
    _thing("ribbon", "light", "pink long yellow pretty", "wave:waved tie:tied hold:held", "torn"),
    _thing("kite", "light", "red yellow long bright paper", "fly:flew chase:chased hold:held", "torn"),
    _thing("balloon", "light", "red blue big round orange", "hold:held chase:chased hug:hugged", "flat"),
    _thing("feather", "light", "white blue soft long", "wave:waved hold:held touch:touched", "torn"),
    _thing("umbrella", "light", "big yellow striped blue", "open:opened spin:spun hold:held"),
    _thing("wagon", "big", "red big wooden old", "pull:pulled push:pushed ride:rode"),
    _thing("sled", "big", "fast blue wooden long", "ride:rode pull:pulled"),
    _thing("bike", "big", "red little shiny green", "ride:rode push:pushed"),
    _thing("apple", "food", "red green big sweet", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("cake", "food", "sweet big round yummy", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("pie", "food", "warm sweet big yummy", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("cookie", "food", "big sweet round warm", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("muffin", "food", "warm sweet tiny yummy", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("pear", "food", "yellow soft sweet juicy", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("sandwich", "food", "big yummy tall", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("berries", "food", "red sweet juicy blue", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("grapes", "food", "green sweet juicy purple", "eat:ate share:shared taste:tasted", "dirty"),
    _thing("bike", "skill", "red little shiny green", "ride:rode", "broken", "the bike fell over"),
    _thing("scooter", "skill", "blue fast new pink", "ride:rode", "broken", "the scooter fell over"),
    _thing("sled", "skill", "fast blue wooden long", "ride:rode", "broken", "the sled went the wrong way"),
    _thing("kite", "skill", "red yellow long bright", "fly:flew", "torn", "the kite fell down"),
    _thing("top", "skill", "little red wooden striped", "spin:spun", "broken", "the top fell down"),
    _thing("hoop", "skill", "big round purple green", "spin:spun roll:rolled", "broken", "the hoop fell down"),
    _thing("ball", "skill", "big red bouncy soft", "catch:caught", "gone", "the ball rolled away"),
    _thing("whistle", "skill", "silver little loud green", "blow:blew", "broken", "no sound came out"),
    _thing("flute", "skill", "long wooden silver old", "play:played", "broken", "it made an ugly sound"),
    _thing("cake", "craft", "sweet big round yummy", "bake:baked", extra="an egg"),
    _thing("pie", "craft", "sweet warm big", "bake:baked", extra="some sugar"),
    _thing("soup", "craft", "warm yummy thick", "cook:cooked", extra="a potato"),
    _thing("tower", "craft", "tall big funny", "build:built", extra="one more block"),
    _thing("picture", "craft", "pretty big funny bright", "paint:painted draw:drew", extra="some blue paint"),
    _thing("sandcastle", "craft", "big tall round", "build:built", extra="a bucket"),
    _thing("snowman", "craft", "tall big funny", "build:built make:made", extra="a carrot"),
    _thing("necklace", "craft", "long pretty blue", "make:made", extra="one more bead"),
    _thing("kite", "craft", "red bright long", "make:made", extra="a long string"),
    _thing("card", "craft", "pretty red funny", "make:made draw:drew", extra="some glue"),
    _thing("puppet", "craft", "silly small funny", "sew:sewed make:made", extra="a button"),
    _thing("crown", "craft", "gold tall shiny", "make:made", extra="some gold paper"),
    _thing("birdhouse", "craft", "little green pretty", "build:built paint:painted", extra="one more nail"),
)
SINGULAR = {"it": "it", "it_was": "it was", "was": "was", "is": "is", "This_is": "This is"}
PLURAL = {"it": "them", "it_was": "they were", "was": "were", "is": "are", "This_is": "These are"}
PLURAL_NOUNS = {"blocks", "crayons", "beads", "boots", "mittens", "berries", "grapes"}

GIRLS = ("Lily", "Mia", "Anna", "Sue", "Lucy", "Amy", "Emma", "Zoe", "Nina", "Rosie", "Ella", "Molly", "Daisy", "Sara")
BOYS = ("Tom", "Tim", "Ben", "Sam", "Max", "Jack", "Leo", "Jim", "Billy", "Finn", "Bob", "Dan", "Joe", "Luke")
ANIMALS = ("cat", "dog", "rabbit", "fox", "bear", "mouse", "duck", "frog", "pig", "squirrel", "owl", "turtle")
SIZES = ("little", "small", "young")
ELDERS = (("mom", "she"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he"))
PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}
TRAITS = tuple("kind brave clever funny gentle silly friendly curious polite cheerful happy quiet".split())
HOBBIES = (
    "sing songs",
    "run in the sun",
    "look at the clouds",
    "play outside",
    "tell jokes",
    "count birds",
    "hop and dance",
    "jump in puddles",
    "pick flowers",
    "listen to stories",
    "look for bugs",
    "help at home",
)
HOMES = ("a green hill", "a river", "a big wood", "the sea", "an old bridge", "a little pond")
PLACES = {
    "park": ("in the park", ("under a bench", "behind a big tree", "in the tall grass", "next to the swings")),
    "garden": ("in the garden", ("under a bush", "behind the roses", "next to the gate", "between two pots")),
    "forest": ("in the forest", ("under a bush", "behind an old log", "next to a mushroom", "under some leaves")),
    "beach": ("at the beach", ("behind a rock", "in the warm sand", "next to an old boat", "under a towel")),
    "field": ("in the field", ("in the tall grass", "behind a haystack", "next to the fence", "under a tree")),
    "farm": ("at the farm", ("behind the barn", "in the hay", "next to the gate", "under the old cart")),
    "lake": ("at the lake", ("behind a rock", "under a bush", "next to the water", "in the reeds")),
    "playground": ("at the playground", ("under the slide", "next to the swings", "in the sand", "behind a bench")),
}

OPENINGS = (
    "Once upon a time, there was {a_who} named {name}.",
    "Once upon a time, {a_who} named {name} lived near {home}.",
    "Once there was {a_who}. {His} name was {name}.",
    "There once was {a_who} named {name}.",
    "Long ago, {a_who} named {name} lived in a tiny house.",
    "{name} was {a_who} who lived near {home}.",
    "In a small town, there was {a_who} named {name}.",
    "Not far from {home} lived {a_who} named {name}.",
)
TRAIT_LINES = (
    "{He} was very {trait}.",
    "{He} was {trait} and liked to {hobby}.",
    "{He} was very {trait}, and {he} loved to {hobby}.",
    "Everyone said that {he} was very {trait}.",
    "{He} liked to {hobby} with {his} {elder}.",
    "Every day, {he} liked to {hobby}.",
)
TRAIT_CLOSINGS = (
    "What a {trait} {who} {he} was!",
    "{Elder} said that {name} was a very {trait} {who}.",
    "And {name} was a very happy {who}.",
)

LOST = Plot(
    kinds=("toy", "tool", "find", "wear", "light"),
    setup=(
        "{He} had {a_thing} and liked to {verb} {it} every day.",
        "One day, {his} {elder} gave {him} {a_thing}. {name} liked to {verb} {it} more than anything.",
        "{name} loved {his} {thing}. {He} wanted to {verb} {it} all the time.",
        "At home, {he} had {a_thing}. It was so much fun to {verb} {it}!",
    ),
    foreshadow=(
        "But {he} never put {it} away at night.",
        '"Put {it} away when you are done," said {Elder}. But {name} forgot.',
        '"One day you will lose {it}," said {Elder}. {name} only laughed.',
    ),
    trouble=(
        "One morning, {name} looked for the {noun}, but {it_was} not there. {He} looked under the bed and behind the "
        "door. No {noun}!",
        "Then, on a rainy day, the {thing} {was} gone. {name} looked in every room. {He} only found an old sock.",
        "One day, {he} played {in_place} until it was late. When {he} came home, the {noun} {was} gone. {name} "
        "wanted to cry.",
        "But one day, {name} could not find the {thing}. {He} looked up and down. {He} felt very sad.",
    ),
    talk=(
        '"What is wrong?" asked {friend_full}. "My {thing} {is} gone!" said {name}. "I will help you look," said '
        "{friend}.",
        '{name} ran to {friend_full}. "Did you see my {noun}?" {he} asked. "No, but two can look better than one," '
        "said {friend}.",
        '"Do not cry," said {friend_full}. "Where did you {verb} {it} last?" "I was {in_place}," said {name}. "Then '
        'we will look there," said {friend}.',
    ),
    told=(
        "{Friend_full} saw that {name} was sad and came to help. They looked high and low.",
        "{name} asked {friend_full} for help. They walked to the {place} and looked all around.",
    ),
    happy=(
        "They looked and looked {in_place}. There {it_was}, {spot}! {name} {verbed} the {noun} and laughed.",
        "{friend} looked {spot} and gave a shout. The {noun} {was} there! {name} {verbed} {it} right away.",
        "At last, {name} saw something {spot}. It was {a_thing}! {name} {verbed} {it} with a big smile.",
    ),
    twist=(
        "Then they heard a small sound. A tiny kitten was asleep {spot}, and the {noun} {was} right next to it! The "
        "kitten only wanted a friend. So {name} took the kitten home, and it watched {him} {verb} the {thing} every "
        "day.",
        "Then {friend} began to laugh. The {noun} {was} in {name}'s own bag the whole time! {name} laughed too. {He} "
        "took out the {thing} and {verbed} {it} all the way home.",
        "Just then, {Elder} came with the {noun} in {e_his} hands. {e_He} had cleaned {it} and made {it} like new! "
        "{name} jumped for joy and {verbed} the {thing} again.",
    ),
    bad=(
        "They looked until it was dark, but the {thing} {was} gone for good. {name} could not {verb} {it} any more. "
        "{He} went home with tears in {his} eyes.",
        "They found the {noun} {spot}, but {it_was} {ruin}. Now {name} could not {verb} {it} any more. {He} cried "
        "and wished {he} had put the {thing} away.",
    ),
    end=(
        "From that day on, {name} always put the {thing} in a safe place at night.",
        "That night, {name} slept with the {thing} next to {his} bed.",
        '"Thank you, {friend}," said {name}. After that, {he} took good care of the {thing}.',
        "{name} gave {friend} a big hug. The {thing} {was} never lost again.",
    ),
    moral=(
        "{name} learned to take care of the things {he} loved.",
        "{name} learned that it is good to put things away.",
        "{name} learned that a good friend makes a sad day better.",
    ),
)

WIND = Plot(
    kinds=("light",),
    setup=(
        "One day, {he} took {his} {thing} to the {place}. {He} wanted to {verb} {it} there.",
        "{He} had {a_thing}. One morning, {name} went to the {place} to {verb} {it}.",
        "{name} could not wait to {verb} {his} {thing}. So {he} ran to the {place} with {it}.",
    ),
    foreshadow=(
        "The sky was gray, and the trees began to shake.",
        '"Hold {it} tight," {Elder} had said. "It is windy today."',
        "Far away, dark clouds were coming.",
    ),
    trouble=(
        "{name} {verbed} the {noun} and laughed. But then a big wind came. Whoosh! The {noun} flew up into a tall "
        "tree.",
        "At first, {he} {verbed} {it} and had fun. Then, whoosh! The wind took the {noun} and put {it} high up in a "
        "tree. {name} jumped, but {he} was too small.",
        "It was fun until the wind came. It took the {noun} out of {his} hands and up into a tree. {name} could not "
        "reach {it}.",
    ),
    talk=(
        '"Help! My {noun} {is} in the tree!" called {name}. {Friend_full} came running. "Let us try with a long '
        'stick," said {friend}.',
        '{Friend_full} walked by. "Why do you look up?" asked {friend}. "My {thing} {is} up there," said {name}. '
        '"Then we need a long stick," said {friend}.',
        '"Please help me," {name} said to {friend_full}. "I cannot reach my {thing}." "I know what to do," said '
        "{friend}, and got a long stick.",
    ),
    told=(
        "{Friend_full} heard {name} cry and came with a long stick.",
        "{name} called {friend_full}, and they found a long stick in the grass.",
    ),
    happy=(
        "{name} held the stick, and {friend} told {him} where to push. One push, two pushes, and down came the "
        "{noun}! Then they both {verbed} {it}.",
        "They pushed the branch again and again. Plop! The {noun} fell down on the soft ground. {name} {verbed} {it} "
        "again and laughed.",
    ),
    twist=(
        "But before they could push, a big bird flew out of the tree with the {noun}. It dropped {it} right on "
        "{friend}'s head! They laughed and laughed. Then they {verbed} the {thing} together.",
        "But the stick was too short. Then the wind came back. Whoosh! It blew the {noun} right into {name}'s arms. "
        '"Thank you, wind!" called {name}, and {he} {verbed} the {thing} again.',
    ),
    bad=(
        "But the wind blew again. It took the {noun} over the trees and far away. {name} could not {verb} {it} any "
        "more. {He} walked home very slowly without the {thing}.",
        "They pushed too hard. The {noun} fell down, but {it_was} {ruin}. Nobody could {verb} {it} again. {name} "
        "picked up the {thing} and cried.",
    ),
    end=(
        '"Thank you," said {name}, and {he} held the {thing} tight all the way home.',
        "When the sun went down, {name} and {friend} walked home with the {thing}.",
        "After that, {name} left the {thing} at home when it was windy.",
        "From then on, {name} always held the {thing} with two hands.",
    ),
    moral=(
        "{name} learned that it is good to ask for help.",
        "{name} learned to be careful on windy days.",
        "{name} learned that two friends can do what one cannot.",
    ),
)

QUARREL = Plot(
    kinds=("toy", "tool", "find", "wear", "light", "big"),
    setup=(
        "One day, {name} and {friend_full} found {a_thing} {in_place}.",
        "One sunny day, {he} went to the {place} with {friend_full}. There they saw {a_thing}.",
        "{His} best friend was {friend}. One day, they both saw {a_thing} {in_place}.",
    ),
    foreshadow=(
        '"Be nice to each other," {Elder} had said that morning.',
        "A wise old bird watched them and shook its head.",
        "They looked at the {noun}, and then they looked at each other.",
    ),
    trouble=(
        '"I want to {verb} {it} first!" said {name}. "No, I saw {it} first!" said {friend}. They pulled and pulled. '
        "Then, bump! They both fell down in the mud.",
        '{name} wanted to {verb} {it}, but {friend} wanted {it} too. "Mine!" shouted {name}. "No, mine!" shouted '
        "{friend}. They pulled until they both fell down.",
        '{friend} took the {noun} and would not let go. "I want to {verb} {it} too!" said {name}. {He} got so mad '
        "that {he} pushed {friend}. Splash! {friend} fell into a puddle.",
    ),
    talk=(
        '{friend} began to cry. "I am sorry," said {name}. "You can {verb} {it} first." {friend} looked up. "We can '
        'take turns," {f_he} said.',
        'They sat still for a while. "I do not like to fight," said {name}. "Let us take turns," said {friend}.',
    ),
    told=(
        "For a while, nobody said a word. Then {name} said sorry, and {friend} said sorry too.",
        "{name} saw that {friend} was sad. {He} felt bad and said sorry.",
    ),
    happy=(
        "They cleaned the {noun}. First {friend} {verbed} {it}, and then {name} {verbed} {it}. It was much more fun "
        "than a fight!",
        "So {friend} {verbed} the {noun} first, and {name} clapped. Then {name} {verbed} {it}, and {friend} clapped.",
    ),
    twist=(
        'Just then, a small duck came by. "You found my {thing}!" it said. The {noun} had been lost! They gave {it} '
        "back, and the happy duck let both of them {verb} the {thing} all day.",
        "Then they looked at each other. They were brown with mud from head to toe, and so {was} the {noun}! They "
        "laughed so much that they forgot the fight. They washed the {thing} and {verbed} {it} together.",
    ),
    bad=(
        "But it was too late. The {noun} {was} {ruin}, and nobody could {verb} {it} any more. The two friends walked "
        "home without the {thing} and did not look at each other.",
        "But the {noun} had fallen into a deep hole, and they could not get {it} out. Nobody got to {verb} the "
        "{thing}, and both friends went home sad.",
    ),
    end=(
        "When it was time to go, they took the {thing} home together.",
        "From then on, {name} and {friend} never had a fight about the {thing} again.",
        '"You are my best friend," said {name}. And the {thing} {was} theirs to share.',
    ),
    moral=(
        "{name} learned that it is more fun to share.",
        "{name} learned that saying sorry can make things good again.",
        "{name} learned that a friend is better than {a_thing}.",
    ),
)

GIFT = Plot(
    kinds=("toy", "tool", "find", "wear", "light", "food"),
    setup=(
        '{He} had {a_thing}. One day, {friend_full} was very sad. "{friend} would like to {verb} {it}," thought '
        "{name}.",
        "One day, it was the birthday of {friend_full}. {name} wanted to give {f_him} {a_thing} to {verb}.",
        "{name} had {a_thing} and could not wait to {verb} {it}. But {friend_full} was all alone that day. So {name} "
        "wanted to give {it} to {f_him}.",
    ),
    foreshadow=(
        '"Be careful on the way," said {Elder}.',
        "The way to {friend}'s house was long.",
        "{name} did not know how hard the way would be.",
    ),
    trouble=(
        "On the way, it began to rain. {name} held the {noun} close and ran as fast as {he} could. {He} was wet from "
        "head to toe.",
        "On the way, {he} came to a cold stream. {name} was scared. But {he} held the {noun} over {his} head and "
        "walked, step by step, to the other side.",
        "On the way, a big goose stood in the road and made a loud noise. {name} held the {noun} close and stood "
        "still. At last, the goose went away.",
        "On the way, {name} stopped. The {noun} looked so nice! {He} wanted to keep {it}. But then {he} thought of "
        "{friend} and walked on.",
    ),
    talk=(
        'Knock, knock! {friend} opened the door. "{This_is} for you," said {name}. "For me?" said {friend}, and '
        "{f_his} eyes got big.",
        '"Surprise!" said {name}. "I have {a_thing} for you." "Thank you, {name}!" said {friend}.',
    ),
    told=(
        "{friend} was so surprised to see {name} at the door. {name} gave {f_him} the {thing}.",
        "At last, {name} came to {friend}'s house and put the {thing} in {f_his} arms.",
    ),
    happy=(
        "{friend} smiled a big smile. They sat by the window and {verbed} the {noun} together.",
        "{friend} gave {name} a long hug. Then they {verbed} the {noun} together and laughed.",
        "{friend} was so happy that {f_he} danced around the room. Then {f_he} {verbed} the {noun}, and {name} did "
        "too.",
    ),
    twist=(
        "Then {friend} laughed and gave {name} a box. Inside {was} {a_thing} too! They had both picked the same "
        "gift. They {verbed} their gifts together and laughed about it all day.",
        'But {friend} gave the {thing} back. "The best gift is that you came," {f_he} said. So they {verbed} {it} '
        "together, and both of them were happy.",
    ),
    bad=(
        "But then a big goat ran in and took the {noun}. They ran after the goat, but it was too fast. Nobody got to "
        "{verb} the {thing}. {name} and {friend} sat on the step and cried.",
        "They put the {noun} by the open window. But a bad crow came and took {it} away. Now nobody could {verb} the "
        "{thing}, and {friend} was sad again.",
    ),
    end=(
        "{name} went home without the {thing}, but {he} felt warm inside.",
        "On the way home, {name} thought of the {thing} and smiled.",
        '"This is the best day," said {friend}. And it was all because of {a_thing}.',
    ),
    moral=(
        "{name} learned that it feels good to give.",
        "{name} learned that good things are better when you share them.",
        "{name} learned that a small gift can make a big smile.",
    ),
)

PRACTICE = Plot(
    kinds=("skill",),
    setup=(
        "More than anything, {name} wanted to {verb} {a_thing}.",
        "One day, {he} saw a big rabbit {verb} {a_thing} {in_place}. {name} wanted to do that too.",
        "{His} {elder} had {a_thing}. {name} wanted to learn how to {verb} {it}.",
    ),
    foreshadow=(
        '"It is not easy," said {Elder}. "You will have to try many times."',
        "{He} thought it would be easy. But {he} did not know yet how hard it was.",
    ),
    trouble=(
        "{He} took the {noun} to the {place}. {He} tried once, but {extra}. {He} tried again, but {extra} again.",
        "{He} tried all morning {in_place}, but every time {extra}. {name} sat down and wanted to cry.",
        '"Now it is my turn," {he} thought. But {extra}. {name} tried again and again, but it did not work.',
    ),
    talk=(
        '"I cannot do it!" said {name}. "Not yet," said {his} {elder}. "Go slowly and try one more time."',
        '"Why are you sad?" asked {his} {elder}. "I will never {verb} the {noun}," said {name}. "You will," said '
        '{Elder}. "I will help you."',
    ),
    told=(
        "{His} {elder} sat down next to {him} and showed {him} how to do it, step by step.",
        "{His} {elder} came and told {him} not to give up.",
    ),
    happy=(
        "{name} took a deep breath. Slowly, slowly, {he} began. And then {he} {verbed} the {noun} all by {himself}! "
        '"Look at me!" {he} shouted.',
        "{name} shut {his} eyes, counted to three, and tried. It worked! {He} {verbed} the {noun} again and again.",
    ),
    twist=(
        'Then {Elder} tried it too. But {extra}! {Elder} laughed and laughed. "I have to learn it too," {e_he} said. '
        "So they tried together, and that day both of them {verbed} the {thing}.",
        "Then a little bee sat on {name}'s nose. {He} was so surprised that {he} forgot to be afraid. All at once, "
        '{he} {verbed} the {thing}! "Thank you, little bee," said {name}.',
    ),
    bad=(
        "But {name} did not want to try any more. {He} left the {noun} out in the rain. In the morning, it was "
        "{ruin}. Now {he} could never {verb} the {thing}, and {he} was very sorry.",
        "But {name} was too mad to listen. {He} kicked the {noun} as hard as {he} could, and now it was {ruin}. {He} "
        "never got to {verb} the {thing}, and {he} cried all night.",
    ),
    end=(
        "That night, {name} dreamed about the {thing} and smiled.",
        "The next day, {name} showed {friend_full} how to {verb} the {thing} too.",
        '"I am so proud of you," said {Elder}. {name} looked at the {thing} and felt very tall.',
    ),
    moral=(
        "{name} learned to never give up.",
        "{name} learned that hard things get easy when you try again.",
    ),
)

WARNING = Plot(
    kinds=("toy", "tool", "find", "wear", "light", "big"),
    setup=(
        '{He} had {a_thing}. "Do not take {it} to the {place}," said {his} {elder}. "You could lose {it} there."',
        '{His} {elder} had {a_thing}. "Please do not {verb} {it} without me," said {Elder}.',
        'One day, {he} got {a_thing}. "Stay close to home with {it}," said {his} {elder}. "The {place} is too far."',
    ),
    foreshadow=(
        "{name} said yes, but {he} did not really listen.",
        '"I will be careful," said {name}. But {he} was already thinking of the {place}.',
    ),
    trouble=(
        "Soon, {name} wanted to {verb} {it} {in_place}. So {he} went there all alone. Then {he} saw a butterfly and "
        "ran after it. When {he} came back, the {noun} {was} gone!",
        "The {place} looked so nice that day! So {name} went there and {verbed} the {noun}. Soon {he} was tired and "
        "fell asleep. When {he} woke up, the {noun} {was} gone!",
    ),
    talk=(
        '{name} ran home. "I am sorry," {he} cried. "I did not listen, and now the {noun} {is} gone." {Elder} took '
        "{his} hand.",
        '"Where {is} the {noun}?" asked {Elder}. {name} looked at {his} feet. "I lost {it}," {he} said. "I am sorry."',
    ),
    told=(
        "{name} went home and told {his} {elder} everything. {Elder} came with {him} to look.",
        "{name} cried all the way home. {Elder} saw {his} tears and knew what was wrong.",
    ),
    happy=(
        'They went back to the {place} with a big light. There {it_was}, {spot}! "I am glad you told me," said '
        "{Elder}.",
        "Together they walked back and looked all over. {name} saw the {noun} {spot} and gave a shout.",
    ),
    twist=(
        "Then {Elder} smiled and showed {him} the {thing}. {e_He} had followed {name} and kept {it} safe the whole "
        "time! {name} laughed and cried at the same time. After that, {he} always listened.",
        "Just then, {friend_full} came by with the {thing}. {friend} had found {it} {spot}! {name} gave {friend} a "
        "hug, and {he} never took the {noun} there again.",
    ),
    bad=(
        "They looked until the stars came out. But somebody had taken the {thing}, and {it_was} never found. {name} "
        "could not sleep that night. {He} wished {he} had listened.",
        "They found the {noun} {spot}, but {it_was} {ruin}. {name} would never {verb} the {thing} again. {He} wished "
        "{he} had listened.",
    ),
    end=(
        "After that, {name} only {verbed} the {thing} close to home.",
        "That evening, {name} put the {thing} away and gave {Elder} a hug.",
        "{name} never took the {thing} away from home again.",
    ),
    moral=(
        "{name} learned to listen to {his} {elder}.",
        "{name} learned that it is good to tell the truth.",
    ),
)

SURPRISE = Plot(
    kinds=("toy", "tool", "find", "wear", "light", "food"),
    setup=(
        "It was {his} birthday, but nobody said a word. {name} wanted {a_thing} to {verb}, but there was no gift for "
        "{him}.",
        "{He} had only one wish. {He} wanted {a_thing} to {verb}. One evening, {he} sat all alone in {his} room.",
        "One night, {he} could not sleep. {He} was thinking about {a_thing}. How nice it would be to {verb} {it}!",
    ),
    foreshadow=(
        "All day, {Elder} had smiled in a funny way.",
        "{He} did not see the two feet behind the curtain.",
    ),
    trouble=(
        "Then {he} heard a sound. Tap, tap, tap! It came from behind the door. {name} hid under a blanket and did "
        "not move.",
        'Scratch, scratch! Something moved in the dark. "Maybe it is a monster," {he} thought. {His} heart went '
        "boom, boom!",
        "Then the light went out. It was very dark. {name} heard steps, and they came closer and closer.",
    ),
    talk=(
        '"Who is there?" asked {name} in a small voice. Nobody said a word.',
        '"Go away, monster!" shouted {name}. But the monster did not go away.',
        '"I am not scared," said {name}, but {his} legs shook.',
    ),
    told=(
        "{name} wanted to run away. But {he} took a deep breath and went to look.",
        "{name} counted to three. Then {he} was brave and looked.",
    ),
    happy=(
        'Then {friend_full} jumped out. "Surprise!" said {friend}. In {f_his} arms {was} {a_thing}! {name} laughed '
        "and {verbed} {it} right away.",
        'It was not a monster. It was {friend_full} with {a_thing}! "{This_is} for you," said {friend}. {name} gave '
        "{f_him} a hug, and they {verbed} {it} together.",
    ),
    twist=(
        'It was only {Elder}! {e_He} was looking for a place to hide {a_thing}. "Oh no, now you saw {it}!" said '
        "{Elder}. They both laughed. Then they {verbed} the {thing} together.",
        'It was only a little bird! Next to the bird {was} {a_thing} with a note: "For {name}." The bird had found '
        "the surprise first. {name} laughed and {verbed} the {thing} right away.",
    ),
    bad=(
        'Then {friend_full} jumped out with {a_thing}. "Surprise!" said {friend}. But {name} was so scared that {he} '
        "pushed {f_him}. The {noun} fell out of the window and {was} gone. Nobody could {verb} {it}, and {friend} "
        "went home sad.",
        "It was only {friend_full} with {a_thing}! But in the dark, {friend} fell over a chair, and now the {noun} "
        "{was} {ruin}. Nobody could {verb} {it} any more. {name} and {friend} sat on the floor and cried.",
    ),
    end=(
        "From then on, {name} thought of the {thing} when {he} heard a tap, and {he} smiled.",
        '"Thank you for the {thing}," said {name}. "It was the best surprise!"',
        "That night, {name} was not scared of the dark. {He} only thought of the {thing}.",
    ),
    moral=(
        "{name} learned that a scary sound can be a nice thing.",
        "{name} learned that it is good to be brave and look.",
    ),
)

CRAFT = Plot(
    kinds=("craft",),
    setup=(
        "One day, {he} wanted to {verb} {a_thing} for {his} {elder}.",
        '"Today I will {verb} {a_thing}," {name} said one morning. It was a surprise for {his} {elder}.',
        "It was almost the birthday of {his} {elder}. {name} wanted to {verb} {a_thing} for {e_him}.",
    ),
    foreshadow=(
        '"I have all I need," {he} thought. But that was not true.',
        "{He} did not see that something was missing.",
    ),
    trouble=(
        "{He} worked and worked. But then {name} stopped. Something was missing. {He} needed {extra}!",
        "{name} began right away. But soon {he} saw that {he} needed {extra}. {He} looked in every room, but {he} "
        "did not find what {he} needed.",
    ),
    talk=(
        '{name} went to {friend_full}. "Do you have {extra}?" {he} asked. "Yes," said {friend}. "But may I help you?"',
        '"Why do you look so sad?" asked {friend_full}. "I need {extra} for my {noun}," said {name}. "I will help '
        'you," said {friend}.',
    ),
    told=(
        "{Friend_full} wanted to help and ran to find {extra}.",
        "{name} asked {friend_full} for help, and {friend} came right away.",
    ),
    happy=(
        "Together they {verbed} the {thing}. {name} did one side, and {friend} did the other.",
        "Side by side, the two friends {verbed} {a_thing}. It took all day, but it was fun.",
    ),
    twist=(
        "Then {friend} looked around and laughed. {Extra} was right there, in front of {name}'s nose! They laughed "
        "until they had to sit down. Then they {verbed} the {thing} together, and {Elder} loved it.",
        "Together they {verbed} the {thing}. But when {Elder} came, {e_he} had {a_thing} too! Both of them had the "
        "same idea. They looked at {e_his} {noun} and at {name}'s {noun} and laughed.",
    ),
    bad=(
        "Together they {verbed} the {thing}. Then they ran to get {Elder}. But when they came back, a big goat had "
        "jumped on it. The {thing} was gone, and {name} had nothing to give.",
        "They {verbed} the {noun} outside, but they did not look at the sky. Soon it began to rain hard. The {thing} "
        "was gone, and {name} cried in {Elder}'s arms.",
    ),
    end=(
        '{Elder} looked at the {thing} and smiled. "It is the best {noun} in the world," {e_he} said.',
        '"We did it!" said {friend}. They looked at the {thing} for a long time.',
        "{name} never forgot the day they {verbed} the {thing}.",
    ),
    moral=(
        "{name} learned that hard work is easy with a friend.",
        "{name} learned that it is good to ask for help.",
    ),
)

PLOTS = (LOST, WIND, QUARREL, GIFT, PRACTICE, WARNING, SURPRISE, CRAFT)
PLOTS_AND_THINGS = tuple((plot, tuple(thing for thing in THINGS if thing.kind in plot.kinds)) for plot in PLOTS)


def write_stories(num_stories: int, seed: int = 0) -> Iterator[str]:
    """Write `num_stories` short stories; the same `seed` always gives the same ones.

    Args:
        num_stories (`int`): how many; story i is the same however many follow it.
        seed (`int`, *optional*, defaults to 0): two seeds give two unrelated streams of stories.

    Yields:
        `str`: one story of 60 to 150 words in four paragraphs, separated by one line break. The writer draws at random
        and does not look back, so a repetition is possible, but there was none in the first million.
    """
    # A string seed is hashed, so that -1 and 1 differ (an integer seed loses its sign).
    rng = random.Random(f"story writer {seed}")
    for _ in range(num_stories):
        template, words = _draw_story(rng)
        yield template.format_map(words)


def _pick(rng: random.Random, options):
    return options[int(rng.random() * len(options))]


def _draw_story(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Draw plot, words and features; returns the story with its `{fields}` open and the words that fill them."""
    plot, things = _pick(rng, PLOTS_AND_THINGS)
    words = _draw_people(rng) | _draw_thing(rng, _pick(rng, things)) | _draw_place(rng)

    outcome = _pick(rng, ("happy", "happy", "happy", "moral", "moral", "twist", "twist", "bad"))
    # Foreshadowing and a moral exclude each other only because both together make the story too long.
    foreshadows = outcome != "moral" and rng.random() < 0.5
    begin = [_pick(rng, OPENINGS), _pick(rng, TRAIT_LINES), _pick(rng, plot.setup)]
    if foreshadows:
        begin.append(_pick(rng, plot.foreshadow))
    middle = [_pick(rng, plot.talk if rng.random() < 0.65 else plot.told)]
    if outcome in ("twist", "bad"):
        close = [_pick(rng, getattr(plot, outcome))]
    else:
        middle.append(_pick(rng, plot.happy))
        close = [_pick(rng, plot.end)]
        if outcome == "moral":
            close.append(_pick(rng, plot.moral))
        elif not foreshadows:
            close.append(_pick(rng, TRAIT_CLOSINGS))
    paragraphs = (begin, [_pick(rng, plot.trouble)], middle, close)
    return "\n".join(" ".join(sentences) for sentences in paragraphs), words


def _draw_people(rng: random.Random) -> dict[str, str]:
    """The character, a friend with another name (both children or both animals, never the same animal), a grown-up."""
    gender, friend_gender = _pick(rng, ("she", "he")), _pick(rng, ("she", "he"))
    name, friend = _pick(rng, _names(gender)), _pick(rng, _names(friend_gender))
    while friend == name:
        friend = _pick(rng, _names(friend_gender))
    who, friend_full = ("girl", f"her friend {friend}") if gender == "she" else ("boy", f"his friend {friend}")
    if rng.random() < 0.4:
        who, other = _pick(rng, ANIMALS), _pick(rng, ANIMALS)
        while other == who:
            other = _pick(rng, ANIMALS)
        friend_full = f"{friend} the {other}"
    elder, elder_gender = _pick(rng, ELDERS)
    words = {"name": name, "who": who, "a_who": _with_article(f"{_pick(rng, SIZES)} {who}"), "friend": friend}
    words |= {
        "friend_full": friend_full,
        "Friend_full": friend_full[0].upper() + friend_full[1:],
        "elder": elder,
        "Elder": elder.capitalize(),
    }
    words |= {"trait": _pick(rng, TRAITS), "hobby": _pick(rng, HOBBIES), "home": _pick(rng, HOMES)}
    return words | _pronouns("", gender) | _pronouns("f_", friend_gender) | _pronouns("e_", elder_gender)


def _names(gender: str) -> tuple[str, ...]:
    return GIRLS if gender == "she" else BOYS


def _pronouns(prefix: str, gender: str) -> dict[str, str]:
    """The fields are called after the male forms: `{he}`, `{him}`, `{his}`, `{himself}`; `{He}` begins a sentence."""
    forms = dict(zip(("he", "him", "his", "himself"), PRONOUNS[gender], strict=True))
    capitals = {field.capitalize(): form.capitalize() for field, form in forms.items()}
    return {prefix + field: form for field, form in (forms | capitals).items()}


def _draw_thing(rng: random.Random, thing: Thing) -> dict[str, str]:
    """The required noun, adjective and verb, and what has to agree with a noun in the plural."""
    adjective, (verb, verbed) = _pick(rng, thing.adjectives), _pick(rng, thing.verbs)
    phrase = f"{adjective} {thing.noun}"
    words = {"noun": thing.noun, "adjective": adjective, "verb": verb, "verbed": verbed, "thing": phrase}
    words |= {"ruin": thing.ruin, "extra": thing.extra, "Extra": thing.extra.capitalize()}
    if thing.noun in PLURAL_NOUNS:
        return words | PLURAL | {"a_thing": f"some {phrase}"}
    return words | SINGULAR | {"a_thing": _with_article(phrase)}


def _draw_place(rng: random.Random) -> dict[str, str]:
    place = _pick(rng, tuple(PLACES))
    in_place, spots = PLACES[place]
    return {"place": place, "in_place": in_place, "spot": _pick(rng, spots)}


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
