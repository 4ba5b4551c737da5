"""The names the demo draws first: things one can name at a glance and tell apart at 20 pixels.

Each category is in order of preference. None of these pictures carries writing or points somewhere, so a mirrored or
tilted one is still what its name says; the demo mirrors and tilts only these.
"""

CATEGORIES: dict[str, str] = {
    "animals": """
        cat, dog, elephant, penguin, turtle, fox, panda, frog, lion, crab, owl, butterfly, octopus, giraffe, unicorn,
        flamingo, spider, snail, whale, fish, shark, parrot, peacock, zebra, ladybug, honeybee, snake, koala, rabbit,
        pig, tiger, rooster, bat, jellyfish, squid, shrimp, swan, bear, wolf, cow, deer, gorilla, hedgehog, lobster,
        scorpion, dragon, kangaroo, duck, chipmunk, T-Rex, monkey, hamster, dolphin, crocodile, camel, turkey,
        tropical fish, hippopotamus, raccoon, skunk, orangutan, ant, beetle, worm, goose, llama, sheep, leopard,
        sauropod, dodo, mammoth, rhinoceros, sloth, otter, poodle, eagle, hatching chick, mosquito, lizard, moose,
        blowfish, seal, boar, orca, bison, goat, horse, fly, beaver""",
    "food": """
        red apple, banana, strawberry, pizza, hamburger, watermelon, doughnut, carrot, egg, grapes, cherries, lemon,
        pineapple, avocado, broccoli, cupcake, ice cream cone, hot dog, taco, pretzel, croissant, eggplant, tomato,
        green apple, pear, peach, french fries, popcorn, birthday cake, lollipop, candy, cookie, chocolate bar, cheese,
        sandwich, sushi, wine glass, beer mug, cocktail glass, bacon, hot pepper, mushroom, ear of corn, kiwi fruit,
        coconut, onion, blueberries, pancakes, teapot, honey pot, bell pepper, rice ball, burrito, chopsticks, custard,
        cucumber, fried egg, baby bottle, glass of milk, bubble tea, poultry leg, spaghetti, tangerine, mango, garlic,
        peanuts, takeout box, chestnut, pie, pea pod, dango, shortcake, green salad, bread, fried shrimp, bagel,
        baguette, beans, olive, potato, meat on bone, waffle, cup with straw, dumpling""",
    "plants and sky": """
        sunflower, cactus, palm tree, rose, evergreen tree, rainbow, star, sun, cloud, crescent moon, tulip, fire,
        maple leaf, four leaf clover, volcano, snowflake, lightning bolt, droplet, ringed planet, deciduous tree,
        cherry blossom, bouquet, potted plant, tornado, lotus, coral, feather, seedling, mountain, hibiscus, comet,
        leafless tree""",
    "things": """
        umbrella, key, light bulb, balloon, scissors, alarm clock, bell, guitar, pencil, camera, bomb, anchor, hammer,
        candle, trophy, wrapped gift, envelope, television, magnet, robot, soccer ball, basketball, rocket, bucket,
        broom, ladder, kite, crystal ball, teddy bear, hourglass, padlock, telephone, gear, joystick, microscope,
        telescope, trumpet, violin, drum, puzzle piece, paintbrush, money bag, bow and arrow, treasure chest, axe,
        screwdriver, flashlight, battery, game die, chess pawn, bullseye, Christmas tree, jack-o-lantern, party popper,
        parachute, compass, fire extinguisher, test tube, pill, syringe, window, chair, toilet, bathtub, door, laptop,
        wrench, shield, coin, basket, sponge, toothbrush, yarn, saxophone, accordion, maracas, harp, microphone,
        megaphone, headphones, movie camera, clapper board, video game, fishing pole, volleyball, baseball,
        shopping cart, package, books, paperclip, crayon, globe with meridians, artist palette, electric plug,
        nesting dolls, yo-yo, abacus, carpentry saw, dagger, hook, mirror, soap, safety pin, boomerang,
        american football, printer, computer mouse, radio, framed picture, scroll, clipboard, pushpin, open book,
        coffin, amphora, bone, tooth, brain, barber pole, watch, stopwatch, balance scale, toolbox, banjo, sled,
        curling stone, musical keyboard, sewing needle, thread, bed, razor""",
    "clothes": """
        crown, top hat, sunglasses, dress, jeans, necktie, backpack, high-heeled shoe, socks, scarf, ring, gem stone,
        lipstick, running shoe, coat, gloves, boxing glove, bikini, purse, kimono, graduation cap, roller skate,
        glasses, briefcase, billed cap, ice skate, ribbon, handbag, t-shirt, flip-flop""",
    "vehicles and places": """
        bicycle, helicopter, airplane, sailboat, tractor, fire engine, bus, red car, police car, castle, house, tent,
        ferris wheel, traffic light, motorcycle, taxi, ambulance, locomotive, racing car, flying saucer, church,
        fountain, skateboard, canoe, kick scooter, pickup truck, wheel, satellite, mosque, hut, factory, fuel pump,
        classical building, circus tent, passenger ship, delivery truck, playground slide, Tokyo tower, speedboat,
        motor scooter, small airplane""",
    "faces and figures": """
        ghost, skull, snowman, alien, clown face, Santa Claus, red heart, cowboy hat face, baby, princess, ninja, eye,
        ear, alien monster, zombie, thumbs up, angry face, nerd face, face with medical mask, exploding head,
        crying face, broken heart, police officer, sleeping face, partying face, fairy, vampire, cold face,
        flexed biceps, mouth, nose, blue heart, green heart, yin yang, waving hand, foot, genie, mermaid, hot face,
        nauseated face""",
}


def in_order() -> list[str]:
    """All picks, the categories interleaved in proportion to their lengths, so that any first N hold some of each."""
    placed: list[tuple[float, str]] = []
    for listed in CATEGORIES.values():
        names = [" ".join(name.split()) for name in listed.split(",")]
        placed += [((rank + 0.5) / len(names), name) for rank, name in enumerate(names)]
    return [name for _, name in sorted(placed)]
