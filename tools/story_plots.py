"""The plots of the built-in stories: one function each, from a teller to paragraphs of sentences.

A plot combines what fits together (what can be lost under a bed, who can reach a roof) and has a
few phrasings of each sentence. `h` is the hero, `f` the other character.
"""

from __future__ import annotations

from collections.abc import Callable

from tools.story_words import COLORS, FAMILY, Teller, a, capital

Paragraphs = list[list[str]]


def lost_thing(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.helper(h)
    thing = f"{t.one_of(COLORS)} {t.one_of(('ball', 'hat', 'scarf', 'blanket', 'toy car', 'boat'))}"
    thing = t.one_of((thing, thing, "teddy bear", "little doll", "picture book", "silver bell"))
    found = t.one_of(("under the bed", "behind the sofa", "under a pile of clothes", "in the bath"))
    first, second = t.some_of(
        ("in the kitchen", "under the table", "in the garden", "on the stairs"), 2
    )
    return [
        [
            *t.opening(h),
            t.say(
                f"{h.He} had {a(thing)} that {h.he} loved very much.",
                f"{h.He} took {h.his} {thing} everywhere.",
                f"Of all {h.his} things, {h.he} loved {h.his} {thing} the most.",
            ),
            t.say(
                f"One day, the {thing} was gone.",
                f"One morning, {h.name} could not find the {thing}.",
                f"But one day, the {thing} was lost.",
            ),
            f"{h.name} looked {first} and {second}, but it was not there.",
            t.say(
                f"{h.He} sat down and began to cry.",
                f"{h.He} felt very sad.",
                f"{h.He} was so sad that {h.he} did not want to eat.",
            ),
        ],
        [
            t.say(
                f'"Do not cry," said {f.of(h)}. "We will look for it together."',
                f'"What is wrong?" asked {f.of(h)}. "I will help you look."',
                f'{capital(f.of(h))} came and said, "Two can look better than one."',
            ),
            f"They looked in every room. At last, {f.name} looked {found}.",
            t.say(
                f"There was the {thing}!",
                f'"Here is your {thing}!" {f.he} said.',
                "And there it was!",
            ),
            *t.maybe(
                f"{h.name} hugged {h.his} {thing} and smiled.",
                f"{h.name} was so happy that {h.he} jumped up and down.",
                f'"Thank you, {f.name}!" said {h.name}, and {h.he} was happy again.',
            ),
            t.say(
                f"{h.He} learned that it is good to ask for help.",
                f"From that day on, {h.name} always put {h.his} {thing} back in its place.",
                f"That night, {h.name} slept with the {thing} in {h.his} arms.",
            ),
        ],
    ]


def stuck_up_high(t: Teller) -> Paragraphs:
    h = t.child()
    color = t.one_of(COLORS)
    thing, verb, place, flew = t.one_of(
        (
            ("kite", "fly", "in a tall tree", "The wind blew hard and pulled the kite away"),
            (
                "balloon",
                "play with",
                "in a tall tree",
                "The wind took the balloon out of {his} hand",
            ),
            ("ball", "throw", "on the roof", "{Name} threw the ball too high"),
            ("toy plane", "throw", "on the roof", "The toy plane flew up and up"),
        )
    )
    flew = flew.format(his=h.his, Name=h.name)
    f, way = t.one_of(
        (
            ("a tall man", "reached up with a long stick"),
            ("a kind woman", "got a ladder and climbed up"),
            ("a little squirrel", "ran up and gave it a push"),
            ("a big bird", "flew up and pushed it down"),
            (f"{h.his} dad", "got a ladder and climbed up"),
            (f"{h.his} big brother", "reached up with a long stick"),
        )
    )
    the = f.replace("a ", "the ", 1) if f.startswith("a ") else f
    return [
        [
            *t.opening(h),
            t.say(
                f"{h.He} had {a(color)} {thing}, and {h.he} loved to {verb} it.",
                f"On {h.his} birthday, {h.he} got {a(color)} {thing}.",
                f"One sunny day, {h.he} went outside to {verb} {h.his} {color} {thing}.",
            ),
            t.say(f"{flew}.", f"Then something bad happened. {flew}."),
            t.say(
                f"Now it was stuck {place}.",
                f"It landed {place} and did not come down.",
            ),
            t.say(
                f"{h.name} jumped as high as {h.he} could, but {h.he} was too small.",
                f"{h.name} jumped and jumped, but it was too high for {h.him}.",
            ),
            *t.maybe(f"{h.He} was sad.", f'"Oh no, my {thing}!" {h.he} cried.'),
        ],
        [
            t.say(f"Just then, {f} came by.", f"Soon {f} came and saw {h.him}."),
            t.say(
                f'"Can you help me, please?" asked {h.name}.',
                f'"My {thing} is stuck," said {h.name}. "Can you help me?"',
            ),
            t.say(f"{capital(the)} {way}.", f'"Yes, I can," said {the}, and {way}.'),
            t.say(
                f"Down came the {color} {thing}!",
                f"The {color} {thing} came down, right into {h.his} hands.",
            ),
            *t.maybe(
                f'"Thank you so much!" said {h.name} with a big smile.',
                f"{h.name} laughed and clapped {h.his} hands.",
                f"{h.name} was happy and said thank you.",
            ),
            *t.maybe(
                f"After that, {h.he} was more careful with {h.his} {thing}.",
                f"They played with the {thing} until the sun went down.",
                f"{h.name} learned that asking for help is a good thing.",
            ),
        ],
    ]


def taking_turns(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.friend(h)
    thing, act, place = t.one_of(
        (
            ("swing", "swing", "in the park"),
            ("slide", "slide", "in the park"),
            ("sled", "ride", "on the snowy hill"),
            ("drum", "play", "in the music room"),
            ("little red bike", "ride", "in front of the house"),
            ("pony", "ride", "on the farm"),
        )
    )
    return [
        [
            *t.opening(h),
            f"One day, {h.he} went to play {place} with {f.of(h)}.",
            t.say(
                f"There was only one {thing}, and they both wanted it.",
                f"They both saw the {thing} at the same time.",
            ),
            t.say(
                f'"I was here first!" said {h.name}. "No, I was!" said {f.name}.',
                f'"It is mine!" shouted {h.name}. "No, it is mine!" shouted {f.name}.',
            ),
            *t.maybe(
                "They were so angry that they did not play at all.",
                f"{f.name} began to cry, and {h.name} felt bad.",
                "Soon they were both angry and sad.",
            ),
        ],
        [
            t.say(
                f"Then {h.name} had an idea.",
                f"{h.name} looked at {h.his} friend and thought for a while.",
            ),
            t.say(
                f'"We can take turns," {h.he} said. "You can go first."',
                f'"I am sorry," {h.he} said. "You go first, and then I will."',
                f'"Let us share," {h.he} said. "First you, and then me."',
            ),
            t.say(
                f"{f.name} smiled and said yes.",
                f'"That is a good idea," said {f.name}.',
            ),
            t.say(
                f"So {f.name} got to {act} first, and {h.name} came next.",
                f"First {f.name} had a turn, and then {h.name} had a turn.",
            ),
            *t.maybe(
                "They laughed and played all day.", f"They had fun with the {thing} all day long."
            ),
            t.say(
                f"{h.name} and {f.name} learned that it is more fun to share.",
                "When you share, everyone is happy.",
                f"When it was time to go home, {h.name} and {f.name} were best friends again.",
            ),
        ],
    ]


def learning(t: Teller) -> Paragraphs:
    h = t.one_of((t.child(), t.child(), t.animal("rabbit", "mouse", "fox", "hedgehog", "bear")))
    if h.is_animal:
        skill, fail, done = t.one_of(
            (
                ("swim", "went under and came up wet", "swam across the pond"),
                ("climb the tall rock", "slipped and fell down", "stood on top of the rock"),
                ("jump over the stream", "fell into the water", "jumped over the stream"),
                ("sing", "made only a funny noise", "sang a sweet song"),
            )
        )
    else:
        skill, fail, done = t.one_of(
            (
                ("swim", "got water in {his} nose", "swam across the pool"),
                ("ride a bike", "fell off and hurt {his} knee", "rode all the way down the road"),
                ("skate", "slipped and fell on the ice", "skated around the lake"),
                (
                    "climb the big tree",
                    "slipped and fell on the grass",
                    "sat at the top of the tree",
                ),
                ("bake bread", "burned it and made it black", "baked a fine brown bread"),
                ("whistle", "made no sound at all", "whistled a happy song"),
            )
        )
    fail = fail.format(his=h.his)
    f = t.friend(h) if h.is_animal else t.helper(h)
    return [
        [
            *t.opening(h),
            t.say(
                f"More than anything, {h.he} wanted to {skill}.",
                f"{h.He} had one big wish. {h.He} wanted to {skill}.",
                f"{capital(f.of(h))} could {skill}, and {h.name} wanted to do it too.",
            ),
            t.say(f"One day, {h.he} tried, but {h.he} {fail}.", f"The first time, {h.he} {fail}."),
            *t.maybe(
                f"{h.He} tried again, and again {h.he} {fail}.", "The next time was no better."
            ),
            t.say(
                f'"I will never learn it," {h.he} said, and {h.he} felt sad.',
                f"{h.name} was sad and wanted to stop.",
                f'"It is too hard for me," said {h.name}.',
            ),
        ],
        [
            t.say(
                f'"Do not give up," said {f.of(h)}. "Try a little every day."',
                f'"Everybody has to start small," said {f.of(h)}. "I will show you."',
                f'{capital(f.of(h))} said, "It was hard for me too. Let us try together."',
            ),
            t.say(
                f"So {h.name} tried again the next day, and the day after that.",
                f"So every day, {h.name} and {f.name} went out to try again.",
            ),
            *t.maybe("Little by little, it got better.", "Each day, it was a little less hard."),
            t.say(f"Then, one day, {h.name} {done}!", f"At last, {h.name} {done}!"),
            t.say(
                f'"I did it!" {h.he} shouted. {h.He} was very proud.',
                f'"You did it!" said {f.name}. {h.name} felt so proud.',
            ),
            *t.maybe(
                f"{h.name} learned that you must keep trying.",
                "If you try and try again, hard things become easy.",
            ),
        ],
    ]


def lost_baby(t: Teller) -> Paragraphs:
    h = t.child()
    baby, sound, mother, home = t.one_of(
        (
            ("duckling", "quack", "duck", "at the pond"),
            ("kitten", "meow", "cat", "in the barn"),
            ("puppy", "bark", "dog", "at the farm"),
            ("chick", "peep", "hen", "in the hen house"),
            ("lamb", "cry", "sheep", "on the green hill"),
            ("baby bird", "peep", "bird", "in the tall tree"),
        )
    )
    color = t.one_of(("white", "brown", "black", "gray"))
    walking = t.one_of(("in the garden", "on the road", "near the river", "in the tall grass"))
    return [
        [
            *t.opening(h),
            t.say(
                f"One day, {h.he} heard a soft {sound}.",
                f"One morning, {h.he} heard a little {sound}.",
            ),
            t.say(
                f"There was a small {color} {baby} all alone {walking}.",
                f"{h.He} looked {walking} and saw a little {color} {baby}.",
            ),
            t.say(
                f"The {baby} was cold and scared.",
                f"The {baby} was lost and very sad.",
                f"The {baby} was shaking, for it was afraid.",
            ),
            t.say(
                f'"Where is your mother?" asked {h.name}.',
                f'"Poor little {baby}," said {h.name}. "I will help you."',
            ),
        ],
        [
            t.say(
                f"{h.He} took the {baby} in {h.his} arms and went to look for its mother.",
                f"{h.He} held the {baby} close, and they went to find its mother.",
            ),
            *t.maybe(
                f"{h.He} walked and walked, until {h.he} heard a loud {sound}.",
                f"{h.He} asked everyone on the way, but nobody knew.",
            ),
            t.say(
                f"Then {h.he} saw a big {color} {mother} {home}.",
                f"At last, {h.he} found a big {color} {mother} {home}.",
            ),
            t.say(
                f"It was the mother of the {baby}!",
                f"The {baby} gave a happy {sound} when it saw its mother.",
            ),
            *t.maybe(
                "The two were so glad to be together again.",
                f"The {mother} looked at {h.name} as if to say thank you.",
            ),
            t.say(
                f"{h.name} went home with a warm heart.",
                f"After that, {h.name} came to see the {baby} every day.",
                f"{h.name} was happy, because {h.he} had helped someone small.",
            ),
        ],
    ]


def afraid(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.one_of(FAMILY)
    fear, scene, truth, end = t.one_of(
        (
            (
                "the dark",
                "One night, the light in {his} room went out",
                "The dark is only the day having a rest",
                "looked at the stars from {his} bed",
            ),
            (
                "thunder",
                "One night, there was a big storm",
                "Thunder is only the clouds playing drums",
                "counted the booms until {he} fell asleep",
            ),
            (
                "the big dog next door",
                "One day, the dog ran up to {him}",
                "The dog only wants to play with you",
                "threw a stick for the dog, and it ran to get it",
            ),
            (
                "deep water",
                "One hot day, everyone went to the lake",
                "The water will hold you if you lie still",
                "lay on {his} back in the cool water",
            ),
            (
                "spiders",
                "One day, a spider sat on {his} window",
                "The spider is much smaller than you are",
                "watched the spider make its pretty web",
            ),
        )
    )
    scene, end = (part.format(he=h.he, him=h.him, his=h.his) for part in (scene, end))
    return [
        [
            *t.opening(h),
            t.say(
                f"{h.He} was brave, but {h.he} was afraid of {fear}.",
                f"There was only one thing that {h.he} did not like, and that was {fear}.",
                f"{h.name} was very afraid of {fear}.",
            ),
            f"{scene}.",
            *t.maybe(
                f"{h.name} wanted to run away.",
                f"{h.name} began to shake and closed {h.his} eyes.",
                f'"Help!" cried {h.name}. "I am scared!"',
            ),
        ],
        [
            t.say(
                f"{capital(f.of(h))} took {h.his} hand.",
                f"{capital(f.of(h))} came and sat with {h.him}.",
                f"{capital(f.of(h))} gave {h.him} a hug.",
            ),
            t.say(
                f'"I am here," said {f.name}. "{truth}."',
                f'"You do not have to be afraid," {f.he} said. "{truth}."',
                f'"{truth}," {f.he} said. "Look, and you will see."',
            ),
            *t.maybe(
                f"{h.name} opened {h.his} eyes and took a deep breath.",
                f"{h.name} held on to {f.name} and thought about it.",
            ),
            t.say(f"Then {h.he} {end}.", f"Slowly, {h.he} felt better. {h.He} {end}."),
            t.say(
                f'"It is not so bad," said {h.name} with a smile.',
                f'"I am not afraid now!" said {h.name}.',
            ),
            t.say(
                f"{h.name} was proud, because {h.he} had been brave.",
                f"From that day on, {h.name} was not afraid of {fear} any more.",
                "To be brave is to be afraid and to try it all the same.",
            ),
        ],
    ]


def homemade_gift(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.one_of((*FAMILY, t.friend(h)))
    gift, made, joy = t.one_of(
        (
            ("a card", "painted a card with a big red heart", "put it on the wall"),
            ("a crown", "made a crown out of flowers", "put it on right away"),
            ("a cake", "baked a small cake with berries on top", "ate two big pieces"),
            ("a picture", "painted a picture of the two of them", "put it on the wall"),
            ("a song", "made up a song", "sang it again and again"),
            ("a bracelet", "made a bracelet out of shells", "never took it off"),
        )
    )
    return [
        [
            *t.opening(h),
            t.say(
                f"It was the birthday of {f.of(h)}.",
                f"The next day was the birthday of {f.of(h)}.",
            ),
            t.say(
                f"{h.name} wanted to give {f.him} something nice, but {h.he} had no money.",
                f"{h.name} went to the shop, but everything cost too much.",
            ),
            *t.maybe(
                f"{h.He} felt sad and did not know what to do.",
                f'"What can I do?" {h.he} asked. {h.He} was worried.',
            ),
        ],
        [
            t.say(f"Then {h.name} had a good idea.", f"{h.He} thought for a long time."),
            t.say(
                f'"I can make {gift}!" {h.he} said.',
                f'"I will make {gift} all by myself," {h.he} said.',
            ),
            t.say(
                f"{h.name} worked all day and {made}.",
                f"{h.He} sat down and {made}.",
            ),
            t.say(
                f'"Happy birthday, {f.name}!" {h.he} said.',
                f'"This is for you, {f.name}," {h.he} said in a small voice.',
            ),
            t.say(
                f'"It is the best gift of all," said {f.name}, and {f.he} {joy}.',
                f"{f.name} was so happy that {f.he} {joy}.",
                f"{f.name} laughed with joy and {joy}.",
            ),
            t.say(
                f"{h.name} learned that a gift made with love is the best one.",
                f"{h.name} felt warm inside, and {h.he} gave {f.name} a hug.",
                "A gift does not need money. It needs love.",
            ),
        ],
    ]


def broken_thing(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.one_of(FAMILY)
    color = t.one_of(COLORS)
    thing = t.one_of(("cup", "plate", "vase", "lamp", "bowl"))
    how = t.one_of(("playing tag", "running", "dancing", "throwing a ball"))
    return [
        [
            *t.opening(h),
            t.say(
                f"{h.His} {f.relation} had {a(color)} {thing} that {f.he} liked very much.",
                f"On the table stood {a(color)} {thing}. It belonged to {h.his} {f.relation}.",
            ),
            t.say(
                f"One day, {h.name} was {how} in the house.",
                f"One rainy day, {h.name} was {how} inside.",
            ),
            t.say(
                f"Crash! The {thing} fell down and broke.",
                f"The {color} {thing} fell on the floor and broke.",
            ),
            t.say(
                f"{h.name} was afraid and put the pieces under the bed.",
                f"{h.name} hid the pieces in a box and said nothing.",
            ),
            *t.maybe(f"But {h.he} felt bad all day.", f"But {h.he} could not sleep that night."),
        ],
        [
            t.say(
                f"In the end, {h.he} went to {h.his} {f.relation} and told the truth.",
                f"At last, {h.name} showed the pieces to {h.his} {f.relation}.",
            ),
            t.say(
                f'"I broke your {thing}," {h.he} said. "I am so sorry."',
                f'"I am sorry, {f.name}," {h.he} said. "I broke the {thing}."',
            ),
            t.say(
                f'{f.name} was not angry. "Thank you for telling me," {f.he} said.',
                f'{f.name} gave {h.him} a hug. "I am glad you told me," {f.he} said.',
            ),
            t.say(
                f"They took some glue and fixed the {thing} together.",
                "Together they put the pieces back with glue.",
            ),
            *t.maybe(
                f"It was not as pretty as before, but {f.name} liked it even more.",
                f"Now the {thing} stood on the table again.",
            ),
            t.say(
                f"{h.name} felt much better and learned to tell the truth.",
                f"From that day on, {h.name} always told the truth.",
            ),
        ],
    ]


def garden(t: Teller) -> Paragraphs:
    h = t.hero()
    plant, grown, end = t.one_of(
        (
            ("carrot", "was a big orange carrot", "made soup and shared it with everyone"),
            ("pumpkin", "was a pumpkin as big as a chair", "made soup and shared it with everyone"),
            ("sunflower", "was a sunflower as tall as a house", "sat under it and looked up"),
            ("strawberry", "were ten sweet strawberries", "ate them together in the sun"),
            ("bean", "was a bean plant full of beans", "made soup and shared it with everyone"),
            ("rose", "was a sweet red rose", "smelled it together every day"),
        )
    )
    f = t.friend(h) if h.is_animal else t.helper(h)
    return [
        [
            *t.opening(h),
            t.say(
                f"One day, {h.he} found a little {plant} seed.",
                f"One spring day, {f.of(h)} gave {h.him} a {plant} seed.",
            ),
            t.say(
                f"{h.name} put the seed in the ground and gave it water.",
                f"{h.He} dug a small hole and put the seed in it.",
            ),
            t.say(
                f"{h.He} waited one day, and two days, but nothing came up.",
                f"The next morning, {h.he} ran out to look, but there was nothing to see.",
            ),
            *t.maybe(
                f'"Why does it not grow?" asked {h.name}. {h.He} was sad.',
                f"{h.name} was sad and thought that the seed was bad.",
            ),
        ],
        [
            t.say(
                f'"A seed needs time," said {f.of(h)}. "Give it water and wait."',
                f'"You must wait," said {f.of(h)}. "Good things need time."',
            ),
            *t.maybe(
                f"So {h.name} gave it water every day, and {h.he} waited.",
                "The sun came out, and the rain fell, and they waited.",
            ),
            t.say("Then a small green leaf came up!", "One morning, there was a tiny green leaf!"),
            f"It grew and grew, and in the end there {grown}.",
            *t.maybe(
                f"{h.name} was very proud.",
                f'"Look what I have!" {h.he} shouted with joy.',
            ),
            t.say(
                f"{h.name} and {f.name} {end}.",
                f"{h.name} called {f.name}, and they {end}.",
            ),
            *t.maybe(f"{h.name} learned to wait.", "Good things come to those who wait."),
        ],
    ]


def winter_food(t: Teller) -> Paragraphs:
    h = t.child()
    animal, food, thanks = t.one_of(
        (
            ("bird", "some bread", "sang a sweet song at {his} window"),
            ("squirrel", "some nuts", "put a shiny nut at {his} door"),
            ("fox", "some soup", "danced in the grass for {him}"),
            ("deer", "some apples", "let {him} ride on its back"),
            ("rabbit", "a carrot", "came to play in {his} garden"),
            ("mouse", "some cheese", "put a pretty flower at {his} door"),
        )
    )
    thanks = thanks.format(his=h.his, him=h.him)
    size = t.one_of(("little", "small", "thin", "brown"))
    return [
        [
            *t.opening(h),
            t.say(
                "It was winter, and everything was white with snow.",
                "One winter day, it was very cold, and the snow was deep.",
            ),
            t.say(
                f"{h.name} looked out of the window and saw a {size} {animal}.",
                f"On the way home, {h.name} met a {size} {animal}.",
            ),
            t.say(
                f"The {animal} was hungry and could not find any food.",
                f'"I am so hungry," said the {animal}. "There is no food in the snow."',
            ),
            *t.maybe(f"{h.name} felt sorry for the {animal}.", f'"Poor {animal}!" said {h.name}.'),
        ],
        [
            t.say(
                f"{h.He} ran to the kitchen and came back with {food}.",
                f"{h.He} went to the kitchen to get {food} for the {animal}.",
            ),
            t.say(
                f"The {animal} ate and ate until it was full.",
                f'"Thank you, {h.name}," said the {animal}. "You are very kind."',
            ),
            *t.maybe(
                f"Every day until spring, {h.name} gave the {animal} something to eat.",
                f"The {animal} came back every day, and they became friends.",
            ),
            t.say(
                f"When spring came, the {animal} {thanks}.",
                f"Then the snow was gone, and the {animal} {thanks}.",
            ),
            *t.maybe(
                f"{h.name} was so happy.", f"{h.name} smiled, and {h.his} heart was full of joy."
            ),
            t.say(
                "If you are kind to others, they will be kind to you.",
                f"{h.name} and the {animal} were friends for a long, long time.",
            ),
        ],
    ]


def rainy_day(t: Teller) -> Paragraphs:
    h = t.child()
    f = t.helper(h)
    plan, instead, fun = t.one_of(
        (
            (
                "have a picnic in the park",
                "have the picnic under the table",
                "ate cake and told funny stories",
            ),
            ("go to the beach", "play beach in the bath", "made big waves and laughed"),
            (
                "sleep in a tent in the garden",
                "make a tent out of blankets",
                "lay in it and told stories",
            ),
            ("go to the zoo", "make a zoo out of toys", "gave every toy animal a name"),
            ("fly a kite", "make boats out of paper", "let the boats float down the street"),
        )
    )
    return [
        [
            *t.opening(h),
            t.say(
                f"One day, {h.he} wanted to {plan} with {f.of(h)}.",
                f"{h.name} and {f.of(h)} had a plan. They wanted to {plan}.",
            ),
            *t.maybe(
                f"{h.name} was so excited that {h.he} got up very early.",
                f"{h.He} had waited for this day all week.",
            ),
            t.say(
                "But then dark clouds came, and it began to rain.",
                "But when they opened the door, it was raining hard.",
            ),
            t.say(
                f'"Now everything is bad," said {h.name} with tears in {h.his} eyes.',
                f"{h.name} sat at the window and was very sad.",
            ),
        ],
        [
            t.say(
                f'"I know what we can do," said {f.name}. "Let us {instead}!"',
                f'{f.name} smiled and said, "The rain can not stop us. We can {instead}!"',
            ),
            *t.maybe(f"{h.name} liked that idea.", f"{h.name} jumped up and ran to help."),
            t.say(f"They {fun}.", f"All day long, they {fun}."),
            t.say(
                f"It was so much fun that {h.name} forgot about the rain.",
                f"{h.name} laughed until {h.his} belly hurt.",
            ),
            *t.maybe(
                f'"This was the best day," said {h.name}.',
                f'"I like the rain now," said {h.name}.',
            ),
            t.say(
                f"{h.name} learned that a bad day can become a good one.",
                "When the sun came out again, they did not even see it.",
            ),
        ],
    ]


def small_can_help(t: Teller) -> Paragraphs:
    h = t.animal("mouse", "frog", "hedgehog", "squirrel")
    big = t.one_of(("bear", "lion", "horse", "elephant", "wolf"))
    trouble, act = t.one_of(
        (
            ("had a thorn in its foot", "pulled the thorn out"),
            ("had its foot under a heavy branch", "dug until the foot was free"),
            ("was caught in a net", "bit the net until it broke"),
            ("could not find the way out of the forest", "ran ahead and showed the way"),
        )
    )
    return [
        [
            *t.opening(h),
            t.say(
                f"One day, {h.he} met {a(big)} and wanted to play.",
                f"Not far away, there lived a big {big}.",
            ),
            t.say(
                f'The {big} laughed at {h.him}. "You are too small to be my friend," it said.',
                f'"You are so small," said the {big}. "You can not do anything."',
            ),
            *t.maybe(
                f"{h.name} felt sad and went home.", f"{h.name} was hurt, but {h.he} said nothing."
            ),
        ],
        [
            t.say(
                f"The next day, {h.name} heard a loud cry. The {big} {trouble}.",
                f"Then, one day, the {big} {trouble}, and it cried for help.",
            ),
            *t.maybe(
                f"Nobody else was there, but {h.name} came at once.",
                f"{h.name} was afraid, but {h.he} ran to help.",
            ),
            t.say(
                f'"Do not worry," {h.he} said, and {h.he} {act}.',
                f'"I can help you," said {h.name}. {h.He} {act}.',
            ),
            t.say(
                f'"Thank you, {h.name}," said the {big}. "I am sorry that I laughed at you."',
                f'"You are small, but you are a true friend," said the {big}.',
            ),
            t.say(
                f"From then on, {h.name} and the {big} played together every day.",
                f"{h.name} was glad, and the two became best friends.",
            ),
            *t.maybe(
                "Even someone small can be a big help.", "You do not have to be big to be brave."
            ),
        ],
    ]


def new_friend(t: Teller) -> Paragraphs:
    h = t.hero()
    f = t.friend(h)
    place = (
        "in the forest" if h.is_animal else t.one_of(("at school", "in the park", "on the beach"))
    )
    game = t.one_of(
        (
            "hide and seek",
            "ball",
            "tag",
            "in the sand" if not h.is_animal else "in the leaves",
        )
    )
    the = f"{a(f.noun)} named {f.name}"
    return [
        [
            *t.opening(h),
            t.say(f"One day, {h.he} saw {the} {place}.", f"One morning, there was {the} {place}."),
            *t.maybe(
                f"{f.name} was new and did not know anyone.",
                f"{f.He} sat all alone and looked at the ground.",
            ),
            t.say(
                f"The others were playing, but nobody asked {f.name} to play.",
                f"{f.name} wanted to play with the others, but {f.he} was too shy to ask.",
            ),
            *t.maybe(
                f"{h.name} saw that {f.he} was sad.",
                f'"{f.name} looks lonely," thought {h.name}.',
            ),
        ],
        [
            t.say(
                f'{h.name} went to {f.him} and said, "Hello! Do you want to play {game}?"',
                f'"Hello, I am {h.name}," {h.he} said. "Come and play {game} with us!"',
            ),
            t.say(
                f"{f.name} looked up and smiled for the first time.",
                f'"Yes, please!" said {f.name}, and {f.his} eyes were bright.',
            ),
            t.say(
                f"They played {game} until it was dark.",
                f"They ran and laughed and played {game} all day.",
            ),
            t.say(
                f'"Will you be my friend?" asked {f.name}. "Of course!" said {h.name}.',
                f'"You are my first friend here," said {f.name}.',
            ),
            t.say(
                f"{h.name} was happy, because now {h.he} had a new friend.",
                f"From that day on, {h.name} and {f.name} were best friends.",
            ),
            *t.maybe(
                "One kind word can change a whole day.",
                "It is easy to make a friend. Just say hello.",
            ),
        ],
    ]


PLOTS: tuple[Callable[[Teller], Paragraphs], ...] = (
    lost_thing,
    stuck_up_high,
    taking_turns,
    learning,
    lost_baby,
    afraid,
    homemade_gift,
    broken_thing,
    garden,
    winter_food,
    rainy_day,
    small_can_help,
    new_friend,
)
