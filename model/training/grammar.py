"""Writes simple children's stories and tiny chats from templates of its own.

Deterministic: the same count and seed give the same lines. Each line is a JSON object
{"t": text, "u": what the user asked, or null}. Needs only the standard library.
"""

import argparse
import json
import random

GIRLS = [
    "Lily",
    "Mia",
    "Anna",
    "Zoe",
    "Ella",
    "Ruby",
    "Emma",
    "Rosie",
    "Nina",
    "Maya",
    "Ivy",
    "Clara",
    "Daisy",
    "Lucy",
    "Molly",
    "Sara",
    "Grace",
    "Amy",
    "Kate",
    "Jane",
    "Hana",
    "Leila",
    "Tara",
    "Nora",
    "Poppy",
]
BOYS = [
    "Tom",
    "Ben",
    "Max",
    "Sam",
    "Leo",
    "Jack",
    "Finn",
    "Noah",
    "Tim",
    "Adam",
    "Oscar",
    "Luke",
    "Eli",
    "Hugo",
    "Theo",
    "Ravi",
    "Omar",
    "Jake",
    "Owen",
    "Paul",
    "Milo",
    "Dan",
    "Kofi",
    "Peter",
    "Henry",
]
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "rabbit": "squeak",
    "duck": "quack",
    "frog": "ribbit",
    "bear": "growl",
    "mouse": "squeak",
    "bird": "tweet",
    "fox": "yip",
    "cow": "moo",
    "pig": "oink",
    "hen": "cluck",
    "sheep": "baa",
    "horse": "neigh",
    "owl": "hoot",
    "lion": "roar",
    "bee": "buzz",
    "goat": "maa",
    "turtle": "hum",
    "squirrel": "chirp",
}
PLACES = [
    ("park", "in"),
    ("garden", "in"),
    ("forest", "in"),
    ("kitchen", "in"),
    ("yard", "in"),
    ("field", "in"),
    ("beach", "on"),
    ("hill", "on"),
    ("farm", "on"),
    ("village", "in"),
    ("barn", "in"),
    ("meadow", "in"),
]
COLORS = ["red", "blue", "green", "yellow", "pink", "purple", "orange", "white", "brown", "black"]
TOYS = [
    "ball",
    "kite",
    "doll",
    "toy car",
    "teddy bear",
    "drum",
    "boat",
    "train",
    "balloon",
    "hat",
    "book",
    "box",
    "scarf",
    "bell",
    "bucket",
    "spoon",
    "umbrella",
    "whistle",
    "blanket",
    "bike",
]
FOODS = [
    "apple",
    "cake",
    "cookie",
    "banana",
    "carrot",
    "sandwich",
    "pear",
    "pie",
    "muffin",
    "orange",
]
ADJECTIVES = [
    "little",
    "small",
    "happy",
    "kind",
    "brave",
    "curious",
    "gentle",
    "clever",
    "funny",
    "quiet",
]
ANIMAL_ADJECTIVES = [
    "little",
    "big",
    "fluffy",
    "friendly",
    "hungry",
    "tiny",
    "sleepy",
    "shy",
    "kind",
    "funny",
]
WEATHER = [
    "The sun was shining",
    "It was a warm day",
    "The sky was blue",
    "It was a bright morning",
    "The wind was soft",
    "It was a sunny day",
    "The birds were singing",
]
OPENINGS = [
    "Once upon a time, there was",
    "Once there was",
    "One day, there was",
    "Long ago, there was",
    "There was once",
]


# Share of documents that are a question with its answer, and of stories that were asked for.
QUESTION_SHARE = 0.05
REQUESTED_SHARE = 0.4
# Share of requests that name no subject.
VAGUE_SHARE = 0.1


def with_article(word):
    """The word with "a" or "an" in front."""
    return ("an " if word[0] in "aeiou" else "a ") + word


class Story:
    """One story's cast: who, where and what, drawn once; plots only arrange them."""

    def __init__(self, rng):
        self.random = rng
        self.is_girl = rng.random() < 0.5
        self.name = rng.choice(GIRLS if self.is_girl else BOYS)
        self.he = "she" if self.is_girl else "he"
        self.He = self.he.capitalize()
        self.his = "her" if self.is_girl else "his"
        self.him = "her" if self.is_girl else "him"
        self.kid = "girl" if self.is_girl else "boy"
        self.friend_is_girl = rng.random() < 0.5
        self.friend = rng.choice(
            [x for x in (GIRLS if self.friend_is_girl else BOYS) if x != self.name]
        )
        self.friend_he = "she" if self.friend_is_girl else "he"
        self.friend_his = "her" if self.friend_is_girl else "his"
        self.friend_him = "her" if self.friend_is_girl else "him"
        self.animal = rng.choice(list(SOUNDS))
        self.sound = SOUNDS[self.animal]
        self.color = rng.choice(COLORS)
        self.toy = rng.choice(TOYS)
        self.food = rng.choice(FOODS)
        self.place, self.preposition = rng.choice(PLACES)
        self.adjective = rng.choice(ADJECTIVES)
        self.animal_adjective = rng.choice(ANIMAL_ADJECTIVES)
        self.grown_up = rng.choice(["mom", "dad", "grandma", "grandpa", "mommy", "daddy"])
        self.grown_up_he = "she" if self.grown_up in ("mom", "grandma", "mommy") else "he"
        self.weather = rng.choice(WEATHER)
        self.opening = rng.choice(OPENINGS)

    def pick(self, *choices):
        """One of the choices."""
        return self.random.choice(choices)

    def maybe(self, probability, *choices):
        """One of the choices with this probability, else nothing."""
        return [self.random.choice(choices)] if self.random.random() < probability else []


def introduce(story):
    """Who the story is about."""
    return story.pick(
        f"{story.opening} {with_article(story.adjective)} {story.kid} named {story.name}.",
        f"{story.opening} {with_article(story.adjective)} {story.kid} called {story.name}.",
        f"{story.name} was {with_article(story.adjective)} {story.kid}.",
    )


def routine(story):
    """What that child usually does."""
    return story.pick(
        f"{story.He} loved to play {story.preposition} the {story.place}.",
        f"{story.name} liked to play with {story.his} {story.color} {story.toy}.",
        f"{story.He} lived with {story.his} {story.grown_up} near the {story.place}.",
        f"Every day, {story.name} went to the {story.place} to play.",
    )


def ending(story):
    """A last sentence."""
    return story.pick(
        f"From that day on, {story.name} was very happy.",
        f"{story.name} went home with a big smile.",
        f"{story.name} was happy and proud.",
        f"That night, {story.name} slept well and had good dreams.",
        "And they all lived happily ever after.",
        "It was the best day ever.",
        f"{story.name} would always remember that day.",
    )


def friendship_ending(story):
    """A last sentence about two friends."""
    return story.pick(
        f"From that day on, {story.name} and {story.friend} were best friends.",
        f"{story.name} and {story.friend} played together every day.",
        f"{story.name} and {story.friend} were good friends and had lots of fun.",
    )


def plot_lost(story):
    """A lost toy is found with a grown-up's help. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        f"{story.He} had {with_article(story.color)} {story.toy} and loved it very much.",
    ]
    lines += [f"One day, {story.name} could not find the {story.toy}."] + story.maybe(
        0.7, f"{story.He} felt very sad.", f"{story.He} began to cry."
    )
    lines += [
        f'"Where is my {story.toy}?" {story.name} asked.',
        f"{story.He} looked under the bed, but it was not there.",
        story.pick(
            f"{story.He} looked behind the door, but it was not there.",
            f"{story.He} looked {story.preposition} the {story.place}, but it was not there.",
        ),
    ]
    lines += [
        f'''Then {story.his} {story.grown_up} said, "{story.pick("Do not worry", "Do not cry", "It is okay")}, {story.name}. {story.pick("Let us look together", "I will help you", "We will find it")}."'''
    ]
    lines += [
        story.pick(
            f"They looked and looked. At last, they found the {story.toy} under {with_article(story.pick('big tree', 'chair', 'table', 'blanket'))}.",
            f"They looked in the {story.pick('box', 'basket', 'car')} and there was the {story.color} {story.toy}!",
        )
    ]
    lines += [
        f'"Thank you!" said {story.name}. {story.He} gave {story.his} {story.grown_up} a big hug.',
        ending(story),
    ]
    return (lines, f"a {story.kid} named {story.name} who lost {with_article(story.toy)}")


def plot_share(story):
    """Food is shared with a hungry friend. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        routine(story),
        f"One day, {story.name} had {with_article(story.food)}. It was {story.pick('big and sweet', 'very yummy', 'fresh and sweet')}.",
        f"{story.name} saw {story.friend}. {story.friend} looked {story.pick('sad', 'hungry', 'very hungry')}.",
    ]
    lines += [
        f'"What is wrong?" asked {story.name}.',
        f'"I am hungry," said {story.friend}. "I do not have any food."',
    ] + story.maybe(0.5, f"{story.name} thought about it.", f"{story.name} wanted to help.")
    lines += [
        f'"You can have some of my {story.food}," said {story.name}.',
        f"{story.name} gave half of the {story.food} to {story.friend}. They sat {story.preposition} the {story.place} and ate together.",
        f'"Thank you, {story.name}," said {story.friend}. "You are very kind."',
        f"{story.name} felt good. {story.pick('Sharing is fun', 'It is good to share', 'Sharing makes friends')}.",
        friendship_ending(story),
    ]
    return (lines, f"a {story.kid} named {story.name} who shares {with_article(story.food)}")


def plot_animal(story):
    """A child meets an animal. Gives the sentences, and what a user might ask for."""
    pet = story.pick("Spot", "Fluffy", "Bella", "Coco", "Bobo", "Pip", "Buddy", "Sunny")
    lines = [
        introduce(story),
        f"One day, {story.name} went to the {story.place}. {story.weather}.",
        f"{story.He} saw {with_article(story.animal_adjective)} {story.animal}.",
        f'"{story.sound.capitalize()}!" said the {story.animal}.',
    ]
    lines += story.maybe(
        0.6,
        f"{story.name} was a little scared at first.",
        f"{story.name} smiled at the {story.animal}.",
    ) + [
        f'"Hello," said {story.name}. "Do you want to play with me?"',
        f"The {story.animal} {story.pick('came closer', 'jumped up and down', 'was very happy')}.",
        f"{story.name} gave the {story.animal} {with_article(story.food)} to eat. The {story.animal} ate it all up.",
    ]
    lines += (
        [
            f"{story.name} named the {story.animal} {pet}. They ran and played {story.preposition} the {story.place} all day."
        ]
        + story.maybe(
            0.6,
            f"When the sun went down, {story.name} took {pet} home.",
            f'"You are my best friend, {pet}," said {story.name}.',
        )
        + [
            story.pick(
                f"From that day on, {story.name} and {pet} were best friends.",
                f"{story.name} and {pet} played together every day.",
            )
        ]
    )
    return (lines, f"a {story.kid} named {story.name} and {with_article(story.animal)}")


def plot_rain(story):
    """A rainy day ends with a rainbow. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        routine(story),
        f"One day, it began to rain. {story.name} was sad because {story.he} could not play outside.",
        f'"I want to go to the {story.place}," said {story.name}.',
        f'''{(story.his.capitalize())} {story.grown_up} said, "{story.pick("Let us wait", "We can play inside", "Do not be sad")}. {story.pick("We can make a cake", "We can read a book", "We can paint a picture")}."''',
    ]
    lines += [
        f"So they {story.pick('played inside', 'had fun at home', 'sat by the warm fire')}. It was a lot of fun.",
        f"Soon the rain stopped and the sun came out. {story.name} saw a big rainbow in the sky.",
        f'"Look!" said {story.name}. "It is red, yellow, green, and blue!"',
        f"{story.name} ran outside and jumped in the puddles. Splash! Splash!",
        ending(story),
    ]
    return (lines, f"a {story.kid} named {story.name} and the rain")


def plot_help(story):
    """An animal in need is helped. Gives the sentences, and what a user might ask for."""
    lines = [
        story.opening
        + f" {with_article(story.animal_adjective)} {story.animal} who lived {story.preposition} the {story.place}.",
        f"One day, the {story.animal} was {story.pick('stuck in the mud', 'stuck in a tree', 'lost and alone')}.",
        f'"Help! Help!" said the {story.animal}.',
        f"{with_article(story.adjective).capitalize()} {story.kid} named {story.name} heard the {story.animal}.",
        f'"Do not be scared," said {story.name}. "I will help you."',
        story.pick(
            f"{story.name} used a long stick to help the {story.animal}.",
            f"{story.name} pulled and pulled.",
            f"{story.name} called {story.his} {story.grown_up} to help.",
        ),
        f"At last, the {story.animal} was safe.",
        f'"Thank you," said the {story.animal}. "You are so kind and brave."',
        story.pick(
            f"The {story.animal} gave {story.name} {with_article(story.color)} {story.pick('flower', 'stone', 'feather')}.",
            f"{story.name} and the {story.animal} went to the {story.place} to play.",
        ),
        ending(story),
    ]
    return (lines, f"{with_article(story.animal)} and a {story.kid} named {story.name} who helps")


def plot_learn(story):
    """Trying again leads to success. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        f"{story.name} wanted to {story.pick('ride a bike', 'fly a kite', 'swim in the lake', 'climb the big tree', 'bake a cake')}.".replace(
            "wanted to", "wanted to learn to"
        ),
        f"{story.He} tried, but it was hard. {story.He} fell down and {story.pick('felt sad', 'wanted to stop', 'began to cry')}.",
        f'"I can not do it," said {story.name}.',
        f'''{story.his.capitalize()} {story.grown_up} said, "{story.pick("Try again", "Do not give up", "Keep trying")}, {story.name}. {story.pick("I know you can do it", "You can do it", "I will help you")}."''',
        f"So {story.name} tried again and again. {story.pick('Each day, it was a little easier', 'It was still hard, but it was fun too')}.",
        f"At last, {story.he} could do it!",
        f'"Look at me! I did it!" said {story.name}.',
        f'"Good job!" said {story.his} {story.grown_up}. "I am so proud of you."',
        f"{story.name} learned that it is good to {story.pick('keep trying', 'never give up', 'work hard')}.",
    ]
    return (lines, f"a {story.kid} named {story.name} who keeps trying")


def plot_quarrel(story):
    """Two friends quarrel and make up. Gives the sentences, and what a user might ask for."""
    lines = [
        f"{story.name} and {story.friend} were friends. They liked to play {story.preposition} the {story.place}.",
        f"One day, they saw {with_article(story.color)} {story.toy}.",
        f'"It is mine!" said {story.name}.',
        f'"No, it is mine!" said {story.friend}.',
        f"They pulled and pulled. Then the {story.toy} {story.pick('fell into the mud', 'broke', 'fell on the ground')}.",
        f"{story.name} and {story.friend} were very sad.",
    ] + story.maybe(0.6, "They did not talk for a long time.", f"{story.name} went home.")
    lines += [
        f'Then {story.name} said, "I am sorry, {story.friend}. We can play with it together."',
        f'"I am sorry too," said {story.friend}.',
        f"They {story.pick('fixed', 'cleaned', 'washed')} the {story.toy} and took turns. It was more fun to play together.",
        friendship_ending(story),
    ]
    return (lines, f"two friends named {story.name} and {story.friend}")


def plot_gift(story):
    """A gift that costs nothing. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        f"It was the birthday of {story.his} {story.grown_up}. {story.name} wanted to give {('her' if story.grown_up_he == 'she' else 'him')} a gift.",
        f'"What can I give?" {story.he} asked. {story.He} did not have any money.',
        f"{story.name} went to the {story.place}. {story.He} saw many {story.pick('red', 'yellow', 'white', 'pink')} flowers.",
        f"{story.He} picked some flowers and {story.pick('made a card', 'put them in a cup', 'tied them with a string')}.",
        f'"Happy birthday!" said {story.name}.',
        f'{story.his.capitalize()} {story.grown_up} was so happy. "Thank you, {story.name}. This is the best gift," {story.grown_up_he} said.',
        f"They ate {story.pick('cake', 'pie', 'cookies')} and danced and sang.",
        ending(story),
    ]
    return (lines, f"a {story.kid} named {story.name} who makes a gift")


def plot_truth(story):
    """Telling the truth about a broken thing. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        f"One day, {story.name} was playing with {story.his} {story.toy} in the house.",
        f"Crash! {story.He} broke {story.pick('a cup', 'a plate', 'the lamp', 'the window')}.",
        f"{story.name} was scared. {story.He} hid under the bed.",
        f'"What was that?" asked {story.his} {story.grown_up}.',
        f"{story.name} thought for a while. Then {story.he} came out.",
        f'"I am sorry. I broke it," said {story.name}.',
        f'{story.his.capitalize()} {story.grown_up} was not angry. "Thank you for telling the truth," {story.grown_up_he} said.',
        f"They cleaned up together. {story.name} learned to always tell the truth.",
    ]
    return (lines, f"a {story.kid} named {story.name} who tells the truth")


def plot_two_animals(story):
    """Two animals on a walk. Gives the sentences, and what a user might ask for."""
    other = story.random.choice([x for x in SOUNDS if x != story.animal])
    n1 = story.name
    n2 = story.friend
    lines = [
        story.opening
        + f" {with_article(story.animal_adjective)} {story.animal} named {n1} and a {story.pick('big', 'small', 'wise', 'funny')} {other} named {n2}.",
        f"They lived {story.preposition} the {story.place}. {story.weather}.",
        f'"Let us have a race," said {n1}.'
        if story.random.random() < 0.5
        else f'"Let us find some food," said {n1}.',
        f'"Yes, let us go!" said {n2}.',
        f"They went past the {story.pick('river', 'big tree', 'old house', 'bridge')} and up the hill.",
    ]
    lines += [
        story.pick(
            f"{n1} was fast, but {n2} was slow. {n1} waited for {story.friend_him}.",
            f"On the way, they found {with_article(story.food)}. It was big, so they shared it.",
            f"Then they saw a deep hole. {n2} fell in, but {n1} pulled {story.friend_him} out.",
        )
    ] + [
        f'"You are a good friend," said {n2}.',
        "They sat in the sun and were happy.",
        friendship_ending(story),
    ]
    return (lines, f"{with_article(story.animal)} named {n1} and a {other} named {n2}")


def plot_bedtime(story):
    """Fear of the dark goes away. Gives the sentences, and what a user might ask for."""
    lines = [
        introduce(story),
        f"It was night, and the {story.pick('moon', 'stars')} {story.pick('shone in the sky', 'came out')}.",
        f"{story.name} did not want to go to bed. {story.He} was scared of the dark.",
        f'"I hear a sound," said {story.name}. "Is it a monster?"',
        f"{story.his.capitalize()} {story.grown_up} came with a light. They looked {story.pick('under the bed', 'behind the door', 'out of the window')}.",
        f'It was only a {story.animal_adjective} {story.animal}! "{story.sound.capitalize()}," said the {story.animal}.',
        f"{story.name} laughed and laughed.",
        f'"Good night, {story.name}," said {story.his} {story.grown_up}.',
        f"{story.name} closed {story.his} eyes and went to sleep. {story.He} was not scared any more.",
    ]
    return (lines, f"a {story.kid} named {story.name} who is scared of the dark")


def plot_farm(story):
    """A visit to the farm. Gives the sentences, and what a user might ask for."""
    animals = story.random.sample(["cow", "pig", "hen", "sheep", "horse", "duck", "goat"], 3)
    lines = [
        introduce(story),
        f"One day, {story.name} went to the farm with {story.his} {story.grown_up}.",
    ]
    for i, x in enumerate(animals):
        lines.append(
            story.pick(
                f'''{["First", "Then", "Last"][i]}, {story.he} saw {with_article(x)}. The {x} said, "{SOUNDS[x].capitalize()}!"''',
                f'{story.name} saw {with_article(x)}. "{SOUNDS[x].capitalize()}, {SOUNDS[x]}!" said the {x}.',
            )
        )
    lines += [
        f'"I like the {animals[story.random.randrange(3)]} best," said {story.name}.',
        f"{story.He} gave the animals some {story.pick('corn', 'grass', 'water', 'carrots')}.",
        story.pick("The animals were happy.", "It was time to go home."),
        ending(story),
    ]
    return (lines, f"a {story.kid} named {story.name} at the farm")


PLOTS = [
    plot_lost,
    plot_share,
    plot_animal,
    plot_rain,
    plot_help,
    plot_learn,
    plot_quarrel,
    plot_gift,
    plot_truth,
    plot_two_animals,
    plot_bedtime,
    plot_farm,
]
QUESTIONS = [
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is the sun?", "The sun is yellow."),
    ("What color is snow?", "Snow is white."),
    ("What color is a banana?", "A banana is yellow."),
    ("What color is an apple?", "An apple is red."),
    ("What color is a carrot?", "A carrot is orange."),
    ("What do you do when you are tired?", "You go to sleep."),
    ("What do you do when you are hungry?", "You eat some food."),
    ("What do you do when you are thirsty?", "You drink some water."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows give us?", "Cows give us milk."),
    ("What do hens give us?", "Hens give us eggs."),
    ("Where do fish live?", "Fish live in the water."),
    ("Where do birds sleep?", "Birds sleep in a nest."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("How many legs does a bird have?", "A bird has two legs."),
    ("How many eyes do you have?", "I have two eyes."),
    ("What comes after one?", "Two comes after one."),
    ("What comes after two?", "Three comes after two."),
    ("What comes after three?", "Four comes after three."),
    ("When does the moon come out?", "The moon comes out at night."),
    ("When does the sun come out?", "The sun comes out in the day."),
    ("What falls from the clouds?", "Rain falls from the clouds."),
    ("Is fire hot or cold?", "Fire is hot."),
    ("Is ice hot or cold?", "Ice is cold."),
    ("What should you say when you get a gift?", "You should say thank you."),
    ("What should you say when you hurt a friend?", "You should say sorry."),
    ("Hello!", "Hello! Do you want to hear a story?"),
    ("Hi!", "Hello! Do you want to hear a story?"),
    ("How are you?", "I am happy today. How are you?"),
    ("Who are you?", "I am a little model that tells stories."),
    ("What can you do?", "I can tell you a little story."),
    ("Thank you!", "You are welcome!"),
    ("Good night!", "Good night! Sleep well."),
    ("Good morning!", "Good morning! It is a sunny day."),
] + [
    (f"What does {with_article(a)} say?", f"{with_article(a).capitalize()} says {story}.")
    for a, story in SOUNDS.items()
]
REQUESTS = [
    "Tell me a story about {}.",
    "Write a story about {}.",
    "Can you tell me a story about {}?",
    "I want a story about {}.",
    "Please tell me a story about {}.",
]


def write_document(rng):
    """One question with its answer, or one story that may have been asked for."""
    if rng.random() < QUESTION_SHARE:
        question, answer = rng.choice(QUESTIONS)
        return {"t": answer, "u": question}
    story = Story(rng)
    sentences, subject = rng.choice(PLOTS)(story)
    paragraphs, at = [], 0
    while at < len(sentences):
        length = rng.randint(3, 5)
        paragraphs.append(" ".join(sentences[at : at + length]))
        at += length
    text = "\n\n".join(paragraphs) if rng.random() < 0.5 else " ".join(sentences)
    user = rng.choice(REQUESTS).format(subject) if rng.random() < REQUESTED_SHARE else None
    # The draw is made in either case: which documents come later depends on it.
    vague = rng.random() < VAGUE_SHARE
    if user is not None and vague:
        user = "Tell me a story."
    return {"t": text, "u": user}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="documents to write")
    parser.add_argument("seed", type=int, help="seed of the random draws")
    parser.add_argument("out", help="JSON lines file to write")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with open(args.out, "w") as file:
        file.writelines(json.dumps(write_document(rng)) + "\n" for _ in range(args.count))


if __name__ == "__main__":
    main()
