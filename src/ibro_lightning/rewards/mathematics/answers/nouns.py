"""What problems count: nouns, and the adjectives before them, that may stand behind a number without changing it.

A list of what is allowed, since what changes a number ("lakh", "pairs", "repeating") is no closed list. It holds what
stands behind numbers, and behind "how many", in the questions of GSM8K and MATH. A unit that is not here is not wrong:
it has to be in the gold, too.
"""

from __future__ import annotations

from ibro_lightning.rewards.mathematics.answers.vocabulary import words

NOUNS = words("""
    accident accordion acorn acre act action actor actress address adult alien allowance ambulance angle animal ant
    apartment app apple apricot arm armadillo arrangement arrow article artist assignment asymptote avocado award
    baby bacterium badge bag bagel bale ball balloon banana band barrel baseball basket bat batch bath bathroom
    battery beach bead beaker bean bear bed bedroom bee beetle bell bicycle bike bill bird birthday biscuit bit bite
    blanket block blog blouse board boat bolt book bookmark boot bottle bounce bouquet bowl box boy bracelet branch
    bread brick brother brownie bubble bucket building bulb bullet bun bunch bundle burger bus bush bushel business
    button buyer byte cabbage cabin cage cake calculator call calorie camel camera camp candle candy canoe cans cap
    car carat card carnation carrot carton case cat caterpillar cell chair chapter character chart check cherry
    chest chicken chicks child chip chocolate chord chore circle city clam class classroom client clip clock cloud
    clown club coach coat cobra coconut code coefficient coin color coloring colour combination comic committee
    computer cone configuration consonant container convention cookie coordinate corner couch country course court
    cousin cow crab cracker crate crayon crew croissant cube cucumber cup cupcake curtain customer cycle daisy
    dancer data date daughter deer desk diagonal diamond diary dice die digit dime dimension dinner dinosaur dish
    divisor dog doll dollop dolphin donut door dot doughnut download dragon drawer drawing dress drink driver drop
    drum duck ear earring edge egg element elephant elevator email employee engine engineer envelope episode
    equation eraser event exam exercise eye face factor factorization factory family fan farm farmer feather fence
    ferry file film finger fish flag flash flashcard flavor flight flip flock floor flower fly folder food forest
    fork frame franc freshman friend frog fruit function game gang garage garden gate gem gentleman ghost gift
    gigabyte giraffe girl glass globe glove goal goat goldfish goose grade grain grandchild grape graph grave group
    guest guitar gum gumball gun guy habit hair ham hamburger hammer hamster hand handshake hat head heart helmet
    hen herd hippo hole home horn horse hotdog hotel house household hunter husband ice idea infant inhabitant
    inning insect instruction integer intersection invitation island item jacket jar jean jelly jellybean jewel job
    joke judge jug juice junior kangaroo kennel key kid kidney kilobyte kindergartner kitchen kite kitten knife
    ladder lady lake lamp lap laptop lattice lawn leaf leg lemon lemonade lens lesson letter level library light
    lightbulb lime line lion lip list litter lizard load loaf location lock locker log lollipop loop machine
    magazine magnet man mango map marble marker mask mat match matchstick mathematician matrix meal meatball medal
    meeting megabyte melon member message microphone milkshake mint mirror mistake model monkey monster mosquito
    mountain mouse mouth move movie muffin mug museum mushroom musician nail name napkin neck necklace neighbor
    neighborhood nest nickel night node noodle note notebook notecard nurse nut object octopus offer office officer
    olive onion option orange orbit orchestra orchid order ordering outcome outfit oven owl pack package packet pad
    page painter painting pallet pan pancake panda panel paper paperclip parakeet parent park parrot part
    participant partner party passenger pasture patch path patient pattern pea peach peacock peanut pear pearl
    pebble pedal peg pen pencil penguin penny pepper performance permutation peso pet petal petunia phone photo
    photograph piano pickle picture pie piece pig pigeon pile pill pillow pillowcase pilot pine pineapple pipe pixel
    pizza place plane planet plant plate player point pole polygon polynomial pond pony poodle pool popsicle
    population position possibility post postcard poster pot potato present pretzel price prisoner prize problem
    program project puff pumpkin pupil puppy purse puzzle pyramid quadrilateral question rabbit race radio rat ray
    ream recipe record rectangle refrigerator region relative report request resident restaurant result rice ride
    ring road robe robin robot rock rocket role roll roof room roommate rooster roots rope rose roulette route row
    rubber ruble ruler run rupee sack saddle salad salmon sample sandwich sausage saxophone scarf schedule school
    scientist scissors seal seashell season seat seating sector seed segment selection senior sentence sequence
    server serving session set shape sheep sheet shelf shell shift ship shirt shoe shop shot shoulder show shower
    shrimp side sign singer sister skateboard skirt slice slide slipper slot snack snail snake snowball snowman soap
    soccer sock soda sofa soldier solution son song sophomore space spider spoon spot sprout squad squares squirrel
    stack stage stair stall stamp star starfish starter state statement station statue steak step stick sticker
    stitch stone stop store story stove straw strawberry street string student stuff subsequence subset substring
    sunflower surface survivor sweater sweet swimmer swing syllable symbol table tablespoon tablet tail tank tape
    target task taxi tbsp teacher team teaspoon teenager tent terabyte term test textbook theater thing ticket tie
    tiger tile tin toad toast toddler token tomato tool toothbrush toothpick toss toucan towel tower town toy track
    tractor trader train transfer trap tray treat tree triangle tribe trick trip troop trophy trout truck truckload
    trumpet tsp tub tube tulip tune tuple turkey turn turtle tutor umbrella uniform unit vacation value van variable
    vase vector vegetable vehicle vertex video view village vine violin visit visitor voice volunteer vote voter
    vowel wall wallet walnut wand watch watermelon wave way weapon weasel weight whale wheel widget wife window wing
    winner wire wolf woman word worker workout worm wrench yoyo yuan zebra zombie
""")
"""In the singular. No word here is a number, or what happens to one."""

ADJECTIVES = words("""
    additional adult available baby big black blue brown chocolate different distinct distinguishable empty extra
    female full gold golden good green identical indistinguishable large long male more new old orange ordered pink
    positive possible purple real red regular silver small special tall total unique valid white whole wooden yellow
    young
""")
"""What may stand before a noun; never alone."""

_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "mice": "mouse"}
_IRREGULAR |= {"geese": "goose", "teeth": "tooth", "vertices": "vertex", "matrices": "matrix", "bacteria": "bacterium"}
_IRREGULAR |= {"leaves": "leaf", "loaves": "loaf", "knives": "knife", "wives": "wife", "wolves": "wolf"}
_IRREGULAR |= {"shelves": "shelf", "scarves": "scarf", "grandchildren": "grandchild", "gentlemen": "gentleman"}


def singulars(word: str) -> list[str]:
    """What the singular of a word may be, the likelier first: itself, and with each plural's ending off.

    >>> singulars("pies"), singulars("boxes")
    (['pies', 'pie', 'pi', 'py'], ['boxes', 'boxe', 'box'])
    """
    found = [word, _IRREGULAR[word]] if word in _IRREGULAR else [word]
    if word.endswith("s") and not word.endswith("ss"):
        found.append(word[:-1])
        if word.endswith("es"):
            found.append(word[:-2])
        if word.endswith("ies"):
            found.append(word[:-3] + "y")
    return found


def noun(word: str) -> str | None:
    """The singular of a noun that is counted; None for any other word.

    >>> noun("cookies"), noun("potatoes"), noun("lens"), noun("lakhs")
    ('cookie', 'potato', 'lens', None)
    """
    return next((singular for singular in singulars(word.lower()) if singular in NOUNS), None)
