/// Looks for tags in a text that comes in pieces, and holds back what may be the beginning of one.
#[derive(Debug)]
pub(super) struct TagFinder {
    tags: &'static [&'static str],
    held: String,
}

/// What a character led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing new is certain.
    Nothing,
    /// This text is no part of a tag.
    Text(String),
    /// A tag ended here, after this text.
    Tag(String, &'static str),
}

impl TagFinder {
    /// No tag is the beginning of another.
    pub fn new(tags: &'static [&'static str]) -> Self {
        Self { tags, held: String::new() }
    }

    pub fn push(&mut self, c: char) -> Found {
        self.held.push(c);
        // The first place from where the rest may be a tag.
        for (at, _) in self.held.char_indices() {
            let rest = &self.held[at..];
            let Some(tag) = self.tags.iter().find(|tag| tag.starts_with(rest)) else { continue };
            let whole = tag.len() == rest.len();
            let before: String = self.held.drain(..at).collect();
            if whole {
                self.held.clear();
                return Found::Tag(before, tag);
            }
            return if before.is_empty() { Found::Nothing } else { Found::Text(before) };
        }
        Found::Text(std::mem::take(&mut self.held))
    }

    /// What was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_after_its_own_beginning() {
        let mut finder = TagFinder::new(&["<<a>", "</b>"]);
        let mut found = Vec::new();
        for c in "x<<<a>y<".chars() {
            match finder.push(c) {
                Found::Nothing => {}
                other => found.push(other),
            }
        }
        let text = |t: &str| Found::Text(t.into());
        assert_eq!(found, [text("x"), text("<"), Found::Tag(String::new(), "<<a>"), text("y")]);
        assert_eq!(finder.finish(), "<");
    }
}
