"""What the synthetic voices say: a small grammar and sentences with numbers, for each language (all written here)."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

TEST_SHARE = 5  # one text in five is held out


@dataclass(frozen=True)
class Language:
    """A sentence is a subject, a predicate and an ending; `numbers` are templates with hour, minute, number, year."""

    voices: tuple[str, ...]  # espeak-ng voice names
    subjects: tuple[str, ...]
    predicates: tuple[str, ...]
    endings: tuple[str, ...]
    numbers: tuple[str, ...]


LANGUAGES = {
    "en": Language(
        ("en-us", "en-gb", "en-gb-scotland", "en-us-nyc", "en-gb-x-rp"),
        ("My sister", "The old captain", "A friend of ours", "Nobody", "The new teacher", "Our neighbour", "The river"),
        (
            "wants to show you the garden", "bought three bottles of milk", "never forgets a face",
            "opened the window and listened", "would rather walk than drive", "sings about the moon",
            "moves slowly through the valley", "asked for another cup of coffee", "paints blue boats",
        ),
        (
            "before the sun goes down.", "when it rains.", "because the shop was closed!", "every other Sunday.",
            "as far as I know.", "and that is all?", "in the middle of the night.",
        ),
        ("It is {hour}:{minute:02d}, and {number} people are waiting.", "In {year} we counted {number} ships."),
    ),
    "de": Language(
        ("de",),
        ("Meine Schwester", "Der alte Müller", "Unsere Nachbarin", "Das kleine Mädchen", "Niemand", "Ein guter Freund"),
        (
            "sucht seit Tagen den Schlüssel", "möchte heute früher nach Hause", "erzählt eine lange Geschichte",
            "fährt mit dem Zug ans Meer", "öffnet langsam die Tür", "kauft Brot und frische Pflaumen",
            "lacht über den schönen Hut",
        ),
        (
            "weil es draußen schneit.", "bevor der Abend kommt.", "wie jedes Jahr im Mai.", "oder etwa nicht?",
            "ohne ein Wort zu sagen.", "mitten in der Nacht!",
        ),
        ("Es ist {hour} Uhr {minute}, Zimmer {number} ist frei.", "Im Jahr {year} waren es {number} Bücher."),
    ),
    "fr": Language(
        ("fr-fr", "fr-be", "fr-ch"),
        ("Ma voisine", "Le vieux facteur", "Notre ami", "La petite fille", "Le boulanger", "Personne"),
        (
            "prépare une soupe aux légumes", "regarde tomber la pluie", "voudrait partir en voyage",
            "ouvre doucement la fenêtre", "chante une chanson ancienne", "cherche son parapluie rouge",
            "raconte une histoire drôle",
        ),
        (
            "avant la fin du jour.", "au bord de la rivière.", "parce que c'est dimanche !", "sans faire de bruit.",
            "comme tous les matins.", "n'est-ce pas ?",
        ),
        ("Il est {hour} heures {minute}, il reste {number} places.", "En {year}, il y avait {number} maisons."),
    ),
    "es": Language(
        ("es", "es-419"),
        ("Mi hermana", "El viejo pescador", "Nuestra vecina", "El niño", "Nadie", "Un buen amigo"),
        (
            "quiere abrir la ventana", "compra pan y naranjas", "cuenta una historia muy larga",
            "camina despacio por la playa", "busca las llaves de la casa", "pinta barcos azules",
            "canta una canción de cuna",
        ),
        (
            "antes de que llueva.", "todos los domingos.", "porque hace mucho calor.", "en medio de la noche.",
            "sin decir una palabra.", "¿verdad?",
        ),
        ("Son las {hour}:{minute:02d} y faltan {number} minutos.", "En {year} vinieron {number} personas."),
    ),
    "it": Language(
        ("it",),
        ("Mia sorella", "Il vecchio marinaio", "La nostra vicina", "Il bambino", "Nessuno", "Un buon amico"),
        (
            "vuole aprire la finestra", "compra il pane e le mele", "racconta una storia molto lunga",
            "cammina piano sulla spiaggia", "cerca le chiavi di casa", "dipinge barche azzurre",
            "beve un caffè al bar",
        ),
        (
            "prima che faccia buio.", "ogni domenica mattina.", "perché fuori piove.", "nel mezzo della notte.",
            "senza dire una parola.", "non è vero?",
        ),
        ("Sono le {hour} e {minute}, ci sono {number} posti.", "Nel {year} c'erano {number} libri."),
    ),
    "pt": Language(
        ("pt", "pt-br"),
        ("Minha irmã", "O velho pescador", "A nossa vizinha", "O menino", "Ninguém", "Um bom amigo"),
        (
            "quer abrir a janela", "compra pão e laranjas", "conta uma história muito longa",
            "anda devagar pela praia", "procura as chaves da casa", "pinta barcos azuis", "canta baixinho",
        ),
        (
            "antes da chuva.", "todos os domingos.", "porque faz muito calor.", "no meio da noite.",
            "sem dizer uma palavra.", "não é?",
        ),
        ("São {hour} horas e {minute}, faltam {number} dias.", "Em {year} chegaram {number} navios."),
    ),
    "nl": Language(
        ("nl",),
        ("Mijn zus", "De oude schipper", "Onze buurvrouw", "Het kleine meisje", "Niemand", "Een goede vriend"),
        (
            "zoekt al dagen de sleutel", "wil vandaag vroeg naar huis", "vertelt een lang verhaal",
            "fietst langs het water", "doet langzaam de deur open", "koopt brood en verse peren",
        ),
        (
            "omdat het regent.", "voordat het donker wordt.", "zoals elk jaar in mei.", "midden in de nacht!",
            "zonder iets te zeggen.",
        ),
        ("Het is {hour} uur {minute}, kamer {number} is vrij.", "In {year} waren er {number} boeken."),
    ),
    "pl": Language(
        ("pl",),
        ("Moja siostra", "Stary rybak", "Nasza sąsiadka", "Mały chłopiec", "Dobry przyjaciel", "Nowa nauczycielka"),
        (
            "szuka klucza do domu", "opowiada długą historię", "powoli otwiera okno", "kupuje chleb i jabłka",
            "idzie brzegiem rzeki", "maluje niebieskie łodzie",
        ),
        ("zanim zajdzie słońce.", "w każdą niedzielę.", "bo pada deszcz.", "w środku nocy.", "bez jednego słowa."),
        ("Jest godzina {hour}:{minute:02d}, mamy {number} miejsc.", "W roku {year} było {number} książek."),
    ),
    "sv": Language(
        ("sv",),
        ("Min syster", "Den gamle fiskaren", "Vår granne", "Den lilla flickan", "Ingen", "En god vän"),
        (
            "letar efter nyckeln", "berättar en lång historia", "öppnar sakta fönstret", "köper bröd och äpplen",
            "går längs stranden", "målar blå båtar",
        ),
        ("innan solen går ner.", "varje söndag.", "för att det regnar.", "mitt i natten!", "utan att säga något."),
        ("Klockan är {hour}:{minute:02d} och {number} personer väntar.", "År {year} fanns det {number} hus."),
    ),
    "tr": Language(
        ("tr",),
        ("Kız kardeşim", "Yaşlı balıkçı", "Komşumuz", "Küçük çocuk", "Yeni öğretmen", "İyi bir arkadaş"),
        (
            "yağmur yağmadan önce", "her pazar sabahı", "gecenin ortasında", "hiçbir şey söylemeden",
            "deniz kıyısında", "uzun bir yoldan sonra",
        ),
        (
            "evin anahtarını arıyor.", "pencereyi yavaşça açıyor.", "ekmek ve elma alıyor.",
            "uzun bir hikâye anlatıyor.", "mavi kayıklar çiziyor.",
        ),
        ("Saat {hour}:{minute:02d}, {number} kişi bekliyor.", "{year} yılında {number} kitap vardı."),
    ),
    "fi": Language(
        ("fi",),
        ("Siskoni", "Vanha kalastaja", "Naapurimme", "Pieni tyttö", "Uusi opettaja", "Hyvä ystävä"),
        (
            "etsii kodin avainta", "kertoo pitkän tarinan", "avaa hitaasti ikkunan", "ostaa leipää ja omenoita",
            "kävelee joen rantaa", "maalaa sinisiä veneitä",
        ),
        ("ennen kuin aurinko laskee.", "joka sunnuntai.", "koska sataa.", "keskellä yötä!", "sanomatta sanaakaan."),
        ("Kello on {hour}:{minute:02d}, ja {number} ihmistä odottaa.", "Vuonna {year} oli {number} taloa."),
    ),
    "id": Language(
        ("id",),
        ("Kakak saya", "Nelayan tua itu", "Tetangga kami", "Anak kecil itu", "Guru baru", "Seorang teman baik"),
        (
            "mencari kunci rumah", "bercerita panjang sekali", "membuka jendela pelan-pelan",
            "membeli roti dan apel", "berjalan di tepi sungai", "melukis perahu biru",
        ),
        ("sebelum matahari terbenam.", "setiap hari Minggu.", "karena hujan.", "di tengah malam.", "tanpa kata."),
        ("Sekarang pukul {hour} lewat {minute}, ada {number} orang.", "Pada tahun {year} ada {number} kapal."),
    ),
    "ro": Language(
        ("ro",),
        ("Sora mea", "Bătrânul pescar", "Vecina noastră", "Copilul", "Nimeni", "Un prieten bun"),
        (
            "caută cheia casei", "spune o poveste lungă", "deschide încet fereastra", "cumpără pâine și mere",
            "merge pe malul râului", "pictează bărci albastre",
        ),
        ("înainte de apus.", "în fiecare duminică.", "pentru că plouă.", "în mijlocul nopții.", "fără să zică nimic."),
        ("Este ora {hour} și {minute}, sunt {number} locuri.", "În anul {year} erau {number} cărți."),
    ),
    "cs": Language(
        ("cs",),
        ("Moje sestra", "Starý rybář", "Naše sousedka", "Malý chlapec", "Dobrý přítel", "Nová učitelka"),
        (
            "hledá klíč od domu", "vypráví dlouhý příběh", "pomalu otevírá okno", "kupuje chleba a jablka",
            "jde podél řeky", "maluje modré lodě",
        ),
        ("než zapadne slunce.", "každou neděli.", "protože prší.", "uprostřed noci.", "beze slova."),
        ("Je {hour}:{minute:02d} a čeká {number} lidí.", "V roce {year} tu bylo {number} domů."),
    ),
}  # fmt: skip


def text_split(text: str) -> str:
    """'train' or 'test', a fixed property of the words."""
    return "test" if zlib.crc32(text.encode()) % TEST_SHARE == 0 else "train"


def _sentence(language: Language, rng: random.Random) -> str:
    if rng.random() < 0.2:
        hour, minute = rng.randrange(1, 24), rng.randrange(1, 60)
        number, year = rng.randrange(2, 3000), rng.randrange(1850, 2090)
        return rng.choice(language.numbers).format(hour=hour, minute=minute, number=number, year=year)
    return " ".join(rng.choice(words) for words in (language.subjects, language.predicates, language.endings))


def sentences(language: str, split: str, rng: random.Random) -> Callable[[], str]:
    """A source of sentences of one split."""
    grammar = LANGUAGES[language]

    def draw() -> str:
        while True:
            text = _sentence(grammar, rng)
            if text_split(text) == split:
                return text

    return draw
