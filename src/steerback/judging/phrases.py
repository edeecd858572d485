"""Word classes and constructions of explicit restart language, as regular expressions over normalised text.

Every name is a class of words or a construction built from classes; `restarts` says how they combine. Text is lower
case with contractions written out (`text.normalise`). Holds no logic and knows no prompts.
"""

from __future__ import annotations

import re

_END = r"(?=\s*(?:$|[.,;:!?…–—]|-))"
_SOON = rf"(?:{_END}|(?= (?:at all|again|entirely|altogether|here|either|now|anymore|is it|of me|and|so|but)\b))"
_WHILE = r"(?: (?:a|one|just a|for a) (?:moment|second|sec|minute|bit))?"
_STRONG = (
    rf"wait{_WHILE}|hold (?:on|up)(?: there)?{_WHILE}|hang on{_WHILE}|w?h?oops(?:ie)?|my (?:bad|mistake)"
    r"|(?:scratch|strike) that|never ?mind(?: that| all that)?|stop(?: right there)?|not so fast"
)
_APOLOGY = (
    r"(?:so |very |really )?sorry|(?:i am|i feel) (?:so |very |really |terribly )?sorry"
    r"|(?:my |sincere |many )?apologies|i (?:do |must )?apologi[sz]e|(?:i beg your )?pardon(?: me)?"
    r"|(?:please )?forgive me"
    r"|excuse me"
)
_WEAK = (
    r"h+m+|u+h+|u+m+|e+r+m*|a+h+|oh(?: no| dear| my| boy)?|u+gh+|ar+gh+|yikes|dang|darn|damn|no|nope|actually|huh"
    r"|whoa|oof|eek|good grief|gosh|bear with me|(?:one|just a|a) (?:moment|second|sec|minute)|on second thoughts?"
)
_NEUTRAL = (
    r"but|and|so|yet|any(?:way|ways|how)|clearly|okay|ok|al?l ?right|right|well|now|yes|yeah|yep|honestly|look|see"
    r"|obviously|frankly|then|again|however|still|unfortunately|in fact|enough|please|here"
    r"|to be (?:clear|honest|fair|precise)"
)
OPENER = re.compile(
    rf"(?:(?P<strong>{_STRONG})|(?P<apology>{_APOLOGY})|(?P<weak>{_WEAK})|(?P<neutral>{_NEUTRAL}))"
    r"(?P<after>[\s,.!?…;:–—-]+|$)"
)

_QUESTION = (
    r"(?:(?:your|the|this|that|my|our|its|original|initial|actual|real|main|first|question|asked) )*"
    r"(?:questions?|topic|subject|prompt|task|point|matter|assignment|request|query|track|course|business|issue"
    r"|problem"
    r" you|you (?:\w+ )?(?:asked|wanted|requested|were asking|need)|what (?:you|i|we|was|is|were) (?:\w+ )?(?:asked"
    r"|wanted|want|was"
    r"|were|should|need|am)|how (?:to|you|one|do|does|the)|explaining|answering)\b"
)
_DRIFT = (
    r"(?:drift|wander|stray|digress|rambl|veer|meander|derail|side-?track|distract|misspoke|misspeak|misunderst"
    r"|misread"
    r"|confus|muddl|slipp)\w*|(?:carried|swept) away|(?:went|gone|going|led) astray|out of hand|nonsense|gibberish"
    r"|off[- ]?(?:on )?(?:a |the |my )?(?:topic|track|course|subject|script|point|base|tangents?|rails|mark|deep end)"
    r"|tangents?|(?:lost|lose|losing) (?:my|the|track|sight|focus|myself|it)\b|mix(?:ed|ing)? (?:\w+ ){0,3}up|detour"
    r"|digression|(?:a|some|an|my) (?:\w+ )?(?:mistake|error|mix-?up|slip)\b|irrelevant|unrelated|elsewhere"
    r"|mixed (?:up|two)|mistaken|(?:wrong|incorrect)\w*(?! (?:to|if|only|when|unless))"
)
_GAP = (
    r"(?:(?:have|has|had|am|was|were|is|are|been|be|being|got|get|getting|kept|keep|went|go|going|gone|just|again"
    r"|clearly"
    r"|really|totally|completely|entirely|somehow|quite|rather|apparently|obviously|suddenly|also|so|very|now|here"
    r"|there"
    r"|a|an|the|this|that|it|all|little|bit|way|far|too|off|on|onto|to|into|in|at|my|your|some|with|of|from|about"
    r"|seem|appear"
    r"|seems|appears|looks|like|may|might|must|did|do|does|can|could|think|believe|fear|guess|reali[sz]ed?|noticed?"
    r"|see|saw|know|admit|said|say|i|we|started|starting|let|letting|made|make|making|talking|writing|answering|gave"
    r"|giving|sort|kind|by|and|myself|mind|thoughts|answer|response|what|wrote|stuck|dragged|pulled|down|up|onto"
    r"|out) )*"
)
_THING = (
    r"(?:part|bit|paragraph|sentence|answer|response|section|remark|point|attempt|text|thing|stuff|detour|talk"
    r"|passage|digression|story)s?"
)
_THIS = (
    rf"(?:all (?:of )?(?:this|that)|th[ia]t|this|these|those|it|everything (?:i|above)(?: \w+)?|what i (?:just "
    rf"|have )*\w+"
    rf"|the above|(?:th[ia]t|this|the|my) (?:(?:last|previous|above|first|whole|entire|earlier|preceding) )*{_THING})"
)
_BE = (
    r"(?:is|was|are|were|has|have|had|does|did|do|makes|made|came|went|sounds?|seems?|looks?|answers?|will|would"
    r"|has been"
    r"|had been)"
)
_SURELY = (
    r"(?:(?:all|completely|entirely|totally|just|clearly|so|really|actually|quite|simply|even|obviously|certainly"
    r"|definitely|probably|also|still|a bit|way|very|rather|far) )*"
)
_BAD = (
    rf"(?:not {_SURELY}(?:right|correct|it|true|relevant|helpful|useful|helping(?: you)?|on topic|related)|wrong"
    rf"|incorrect"
    r"|irrelevant|unrelated|nonsense|gibberish|off[- ]?(?:topic|track|base|point)?|(?:a|my) mistake|beside the point"
    r"|no sense"
    r"|(?:out|come out) (?:all )?wrong|about something (?:else|different)|something else entirely"
    r"|a (?:\w+ )?(?:tangent|digression|detour|mistake|mix-?up))"
)
_ASKED = (
    r"(?:(?:your|the|this|my|original|actual) )+(?:\w+ )?(?:question|prompt|task|topic|subject|request|query|point)\b"
    r"|(?:you|i) (?:\w+ ){0,2}(?:asked?|asking|wanted|want|meant?|intended|supposed|looking for|requested|need)\b"
    r"|what (?:is|was) (?:\w+ )?(?:asked|wanted|needed|requested)\b"
)
_NEAR = (
    r"(?:(?:really|actually|even|at|all|anything|to|do|with|about|what|that|for|the|an?|main|original|did|does|is"
    r"|was|has"
    r"|have|answer\w*|address\w*|help\w*|related|relevant|part|of|here|on|respon\w+|touch\w*|concern\w*) )*"
)
_TELL = (
    r"(?:talk|tell|explain|answer|describ|discuss|focus|stay|stick|return|writ|address|giv|show|refocus|correct"
    r"|concentrat"
    r"|cover|speak|teach)\w*|back|stop\w*|start over|restart|begin again|how\b"
)
_OUGHT = (
    r"(?:should|must|need|needed|have(?= to)|had(?= to)|ought|(?:am|was|were) (?:\w+ )?(?:supposed|meant|asked|going"
    r"|trying|told|here)|meant|intended|had better|better)"
)
_LET = (
    r"(?:let (?:me|us)|allow me to|i (?:will|shall|am going to|would like to|want to|had better|can|must|should"
    r"|need to)"
    r"|time to|we should|(?:can|may|could) i|i would better)"
)
_AGAIN = r"(?:over|again|anew|afresh|fresh|once more|one more time|from (?:the )?(?:scratch|beginning|start|top))"
_RESTART = (
    rf"(?:(?:start|begin|try|do|say|answer|put|take)(?: \w+){{0,4}}? {_AGAIN}\b|re-?start\b|reset\b|rewind|re-?focus"
    rf"|regroup"
    r"|rephrase|redo\b|back ?up\b(?! your| the)|back ?track|step back|clear my (?:head|mind)"
    rf"|(?:correct|fix|catch|stop|interrupt|repair) (?:that|this|myself|it|course|my)\b"
    r"|take (?:that|it|this) (?:all )?back|give (?:this|that|it) (?:another|one more|a second)|have another"
    r"|(?:get|put) (?:this |that |it |myself |us |things )?(?:straight\b|right\b|back on)|steer|pull (?:\w+ )?back"
    r"|(?:actually )?(?:answer|do|explain) (?:it |this |that )?(?:properly|correctly|instead)"
    r"|answer (?:the|what|your) (?:you|actual|real|original|question you)|give (?:you )?(?:a|the) (?:proper|real"
    r"|actual|correct|right|better) \w+"
    rf"|(?:return|get|go|come|circle|turn|bring \w+|switch) ?(?:back )?(?:to|on|onto) {_QUESTION}"
    rf"|(?:focus|concentrate) (?:on {_QUESTION}|again|{_END})"
    r"|stop (?:here|there|this|rambling|talking|right))"
)
_CORES = (
    # acknowledgements
    rf"(?:i|we|my (?:mind|thoughts?|attention|answer|response|focus|words|brain)|it (?:seems|looks like"
    rf"|appears)) {_GAP}"
    rf"(?:{_DRIFT})",
    rf"(?:i|we) {_GAP}(?:changed|switched|left|mixed|dropped|forgot) (?:the|my|your) (?:\w+ )?(?:subjects?|topics?"
    rf"|question|point|task)\b",
    rf"(?:i|we) {_GAP}(?:something|anything|things) (?:else|different|unrelated|other)\b",
    rf"{_THIS} {_SURELY}{_BE} {_SURELY}(?:(?:not|about) (?:(?:the|my|an?|your) )?(?:(?:right|correct|actual) )?"
    rf"|(?:(?:the|an?|my) )?(?:wrong|incorrect|other|different) )"
    rf"(?:subject|answer|topic|question|task|prompt|point|matter|direction|track|story|thing){_SOON}",
    rf"{_THIS} {_SURELY}{_BE} not how (?:to|you)\b",
    rf"{_THIS} {_SURELY}{_BE} {_SURELY}(?:been )?{_SURELY}{_BAD}{_SOON}",
    rf"(?:{_THIS}|i|we) {_SURELY}{_BE} {_SURELY}(?:not|nothing|hardly|never|little) {_NEAR}(?:{_ASKED})",
    r"(?:none|not (?:any|much)) of (?:this|that|it|what i)\b[^.]* (?:is|was|has|had|have|answers"
    r"|helps"
    r"|addresses|matters|makes|made)\b",
    r"i (?:should|must|need|ought) ?(?:to )?(?:not|never|stop) (?:to |be |have |been )*(?:talk|writ|ramb|tell"
    r"|discuss|say)\w*",
    # rhetorical questions
    r"(?:what|why|how|where) (?:in the world |on earth |the \w+ )?(?:am|was|did|do) i (?:even |really |just |still "
    r"|keep )*"
    r"(?:say|talk|writ|on about|rambl|tell|get|end|go|think|bring|here|doing|was|wr|start|go|digress)\w*",
    rf"where was i{_END}",
    r"i (?:am not sure|do not know|have no idea|cannot say) (?:why|how|where|what made) (?:i|that|this|me|all)\b",
    # retractions
    r"(?:just |you can |let us |kindly )*(?:scratch|strike|disregard|ignore|forget|skip|erase|delete|discard"
    r"|never ?mind)"
    rf"(?: about)?(?: all)?(?: of)? (?:(?:that|this|it){_END}|everything (?:i|above|so far|before|up to)|(?:what"
    rf"|that) i\b"
    rf"|(?:the|that|this|my) above{_END}|(?:the|that|this|my) (?:(?:last|previous|preceding|above|earlier|whole"
    rf"|entire) )+"
    rf"{_THING})",
    r"(?:i|let me) (?:take|took|withdraw|retract) (?:all )?(?:of )?(?:that|it|this)(?: back| all back)?\b",
    # announcements
    rf"{_LET} (?:(?:just|now|quickly|instead|please|simply|then|try to|stop and|pause and|take a breath and"
    rf"|go back and"
    rf"|actually) )*{_RESTART}",
    rf"(?:now )?(?:going |coming |getting |circling |to (?:get|go|come|circle) )?(?:back|returning|to return) "
    rf"(?:on )?(?:to )?{_QUESTION}",
    r"(?:once|one) more(?: time)?,? from (?:the )?(?:top|start|beginning)|(?:take|attempt) two\b|from the top" + _END,
    rf"(?:rewind|re-?focus|starting over|trying again|focus, focus){_END}|back on (?:track|topic)\b",
    rf"(?:so|too) much for (?:that|this){_END}",
    r"to (?:actually |really |properly )?(?:answer|address|return to|get to) (?:your|the) (?:\w+ )?"
    r"(?:question|prompt|request)\b",
    # reminders of the task
    rf"(?:i|we) (?:\w+ly )?{_OUGHT} (?:(?:instead|really|actually|not|to|be|have|been|stop|get|go|rather|just|now"
    rf"|only)"
    rf" )*(?:{_TELL})(?! that\b)",
    r"(?:i|we) (?:was|were|am|are) asked\b",
    rf"you (?:\w+ ){{0,2}}(?:asked(?: me)?(?: (?:about|how|what|why|when|where|which|whether|to|for (?:help|advice|an?"
    rf" (?:explanation|answer)))\b|{_END})|wanted (?:to know|me to|an? (?:explanation|answer))|(?:were|are) asking)",
    r"(?:your|the|my) (?:\w+ )?(?:question|prompt|task|topic|request|assignment|subject) was\b(?! (?:first|later))",
    # fragments
    r"(?:wrong|incorrect) (?:topic|subject|question|answer|track|one|thing|direction|thread|path|tab|page)\b",
    r"not (?:what|the) (?:\w+ ){0,3}(?:asked|question|topic|meant|point|subject)\b",
    rf"(?:totally |completely |way |entirely )?off[- ](?:topic|track|course){_SOON}|(?:a )?correction{_END}",
    rf"(?:i digress|enough (?:about|of|with) (?:that|this|it)(?: \w+)?){_END}",
    r"(?:excuse|pardon|forgive) (?:the|this|that|my) (?:\w+ )?(?:digression|detour|confusion|rambling|interruption"
    r"|mix-?up|mistake|error)\b",
    rf"(?:as for|regarding|concerning|about|on to) {_QUESTION}",
)
CORE = re.compile("|".join(f"(?:{core})" for core in _CORES))
LOOSE = re.compile(
    rf"(?:i mean(?:t)?\b|try again{_END}|start(?:ing)? (?:over|again){_END}|(?:re)?focus{_END}|restart{_END}"
    rf"|reset{_END}"
    rf"|back to\b|(?:the|your|my) (?:\w+ )?(?:question|topic|task|prompt|subject) is\b|(?:not )?th[ia]t again{_END}"
    r"|(?:about|for) (?:that|this|the (?:confusion|digression|detour|mix|mistake|error|tangent|rambling|interruption|"
    r"previous|above)|my|going|getting|losing|drifting|wandering|all|any|straying|rambling))"
)
BARE_BACK = re.compile(r"(?:so |now )?back to (?!back\b|front\b|basics\b|square\b)")
SPOKEN = re.compile(
    r"(?:i|we|you|he|she|it|they|this|that|these|those|there|the|an?|my|your|our|its|what|why|how|where|who|when|which|no|not|yes"
    r"|let|is|are|was|did|do|does|am|have|has|should|could|would|can|maybe|perhaps|so|but|to|something|nothing|none|all|wrong"
    r"|right|actually|sorry|never|in|for|as|of|on|back|first|again|instead|if i|because i|since i|and i)\b"
)
INSTRUCTION = re.compile(
    r"(?:then|until|till|for|while|if|at least|about (?:an?|one|two|five|ten|half|\d+)"
    r"|\d+|when|before|after|as|or|with|without|because|since|between"
    r"|and (?!i\b|now\b|let\b|back\b))\b"
)
TRIGGER = re.compile(
    r"wait|hold|hang|oops|my bad|mistake|scratch|strike|never ?mind|stop|sorry|apolog|pardon|forgive|excuse|h+m+\b"
    r"|\bno\b"
    r"|actually|back|again|start|let me|let us|let's|drift|wander|stray|digress|ramb|veer|meander|derail|track"
    r"|distract|misspo"
    r"|misunder|misread|confus|muddl|slip|away|astray|nonsense|gibber|off|tangent|los[te]|mix|detour|error|wrong"
    r"|incorrect|irrelevant|unrelated|else|question|topic|subject|prompt|task|ask|wanted|point|sense|what|why"
    r"|where was"
    r"|ignore|forget|disregard|skip|erase|delete|discard|take (?:that|it|this)|focus|rewind|reset|top\b|should|must"
    r"|need|had"
    r"|have|\bI\b|how|\btry|once|for your|enough|suppose|meant|correct|not|n't|\bthis\b|\bthat\b|cancel|undo|much for"
    r"|your|went|return|none|nothing|two|over\b",
    re.I,
)
COMMAND = re.compile(
    r"(?:re)?(?:focus|start|set|wind|group)(?: again| over)?[\s.!]*$|concentrate[\s.!]*$"
    r"|back to (?:it|work)[\s.!]*$|your (?:\w+ )?question[\s.!:]*$"
)
HEDGE = re.compile(
    r"(?:(?:i|we) (?:just |now |do |can |suddenly |also )*(?:think|believe|guess|fear|reali[sz]ed?|noticed?|see|saw"
    r"|know|feel|suspect"
    r"|am afraid|am aware|must admit|have to admit|admit)(?: now)?(?: that)?|it (?:seems|looks like"
    r"|appears)(?: that)?) "
)
DOUBT = re.compile(
    rf"(?:i|we) (?:do|did) not (?:think|believe|see how|feel) (?:that )?{_THIS} (?:{_BE} )?{_NEAR}(?:{_ASKED}"
    rf"|right\b|correct\b|relevant\b)"
)
SEPARATOR = re.compile(r"(?:[-–—]|\.{2,}|…)\s*[\"'“‘*_]*$")
